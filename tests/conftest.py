"""Set before torch is imported: one thread, and products of matrices that do not depend on memory.

Some tests fork, and a forked process has none of its parent's threads to wait for. One thread also
keeps sums in one order. MKL's products otherwise differ in the last bits with the alignment of
their operands, and tests that resume a run compare bits.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
