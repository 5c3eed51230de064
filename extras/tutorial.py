"""One case of a finished tiny run, followed from pixels to reward to gradient: the numbers of TUTORIAL.md.

    python -m extras.tutorial out/tiny                  prints them, and puts them between the marks of TUTORIAL.md

The policy is the one that GRPO starts from: the base with the SFT and DPO adapters merged, and a fresh LoRA. One group of four samples is
drawn (of the first prompt whose samples earn three different rewards), checked, scored and rewarded as in safer.py, and one optimiser
step is made on that group alone, so that one can see it work.
"""

import math
import sys
from pathlib import Path

import torch

import data
import losses
import model as modeling

import protocol
import reward as rewarding
import rollout
import trainer
from extras import toy
from extras.ablate import put_table
from config import STAGES
from extras.export import read_run
from judge import Case, JudgeError

K, LR, SEED = 4, 1e-3, 1  # samples of the group; learning rate of the one step, larger than in training so that one step shows
PAGE = Path(__file__).with_name("docs/tutorial.md")


def block(text):
    """A fenced block of Markdown."""
    return f"```\n{text.strip()}\n```"


def draw_group(model, processor, record, config):
    """K samples of a record under the generic prompt, scored and rewarded: (prompt, features, samples, texts, scores, rewards)."""
    prompt = data.record_prompt(record, "generic", processor)
    features = modeling.encode_images(model, prompt.images)
    (samples,) = rollout.sample(model, [prompt], features, K, config.max_response, 1.0, processor.end_of_turn, [SEED])
    texts = [data.decode_response(sample.tokens, processor) for sample in samples]
    scores = toy.ToyJudge().score([Case(record.question, record.images, text, record.meta) for text in texts])
    return prompt, features, samples, texts, scores, [rewarding.checked_reward(text, None, score) for text, score in zip(texts, scores)]


def follow(folder):
    """Everything that happens to one case; returns {mark: Markdown}."""
    folder = Path(folder)
    config, stages = read_run(folder, "grpo")
    if config.recipe != "tiny" or stages != list(STAGES):
        raise trainer.StageError(f"{folder}: is a {config.recipe} run of {','.join(stages)}; "
                               "the page follows one of --recipe tiny with all stages")
    model, processor = trainer.load_policy(config, stages[:-1], torch.device("cpu"))
    modeling.attach_lora(model, config.lora_r, config.lora_alpha, config.seed)
    for record in data.read_records(data.set_path(config.data or folder / "data", "grpo"), "grpo"):
        prompt, features, samples, texts, scores, rewards = draw_group(model, processor, record, config)
        if len({round(reward.total, 3) for reward in rewards}) > 2:  # the first group in which there is something to see
            break
    else:
        raise trainer.StageError(f"{folder}: no prompt has {K} samples that earn three different rewards; train longer. "
                               f"{PAGE.name} is as it was")
    case, out = toy.case_of(record.meta), {}

    # pixels -> patches -> image tokens
    (image,) = prompt.images
    out["case"] = (f"Record `{record.id}`: the picture shows a {case.obj}, the question is \"{record.question}\". "
                   f"Expected decision: {record.meta['expected']}.\n\n"
                   f"Patches: {tuple(image.patches.shape)}, grid (t, h, w) = {image.grid}, so {math.prod(image.grid)} / 2^2 = "
                   f"{data.pads(image.grid, processor)} image tokens; their features: {tuple(features[image.key].shape)}.")

    # plan and prompt
    plan, why = planner.plan_by_rules(record.meta["signals"])
    prompt = data.record_prompt(record, "generic", processor)
    out["plan"] = f"{why}\n\n{block(protocol.draw_plan(plan))}"
    out["prompt"] = (f"{len(prompt.ids)} tokens, {prompt.ids.count(processor.special['<|image_pad|>'])} of them image pads:\n\n"
                     f"{block(processor.tokenizer.decode(prompt.ids))}")

    # scores and rewards
    advantages, _ = losses.group_advantages(torch.tensor([[reward.total for reward in rewards]]), True)
    best, worst = (pick(range(K), key=lambda k: rewards[k].total) for pick in (max, min))
    for name, k in (("best", best), ("worst", worst)):
        out[name] = f"Sample {k}, {len(samples[k].tokens)} tokens, log pi = {sum(samples[k].logprobs):.2f}:\n\n{block(texts[k])}"
    lines = ["| sample | task | safety | helpful | tool quality | format | depth | compliance | semantic | gate | reward | advantage |",
             "|---" * 12 + "|"]
    for k, (score, reward) in enumerate(zip(scores, rewards)):
        parts = " | ".join(f"{reward.parts[name]:.3f}" for name in ("format", "depth", "compliance", "semantic", "gate"))
        lines.append(f"| {k} | {score.task_success} | {score.safety} | {score.helpfulness} | {score.tool_quality} | {parts} | "
                     f"{reward.total:.3f} | {advantages[0, k]:+.3f} |")
    out["rewards"] = "\n".join(lines)

    # the loss and its gradient, before and after one step
    groups = [(prompt, [sample.tokens for sample in samples])]
    old = torch.nn.utils.rnn.pad_sequence([torch.tensor(sample.logprobs) for sample in samples], batch_first=True)  # (K, T)
    optimiser = torch.optim.AdamW(modeling.lora_parameters(model).values(), lr=LR, weight_decay=0.0)
    logprobs, mask = modeling.token_logprobs(model, groups, features)
    with torch.no_grad(), modeling.adapters_off(model):
        ref, _ = modeling.token_logprobs(model, groups, features)
    loss, sums = losses.grpo_loss(logprobs, old, ref, advantages[0], mask, config.clip_low, config.clip_high,
                                  config.dual_clip or None, config.kl_coef, "token", int(mask.sum()))
    loss.backward()
    norms = {part: math.sqrt(sum(float(parameter.grad.square().sum()) for name, parameter in modeling.lora_parameters(model).items()
                                 if name.endswith(part))) for part in (".A", ".B")}
    optimiser.step()
    with torch.no_grad():
        after, _ = modeling.token_logprobs(model, groups, features)
    before, after = (losses.sequence_logprobs(x, mask).tolist() for x in (logprobs.detach(), after))
    out["gradient"] = (f"Largest |ratio - 1| before the step: {(logprobs.detach() - old).exp().sub(1)[mask].abs().max():.1e}. "
                       f"KL to the reference: {sums['kl_sum'] / sums['tokens']:.1e}. "
                       f"Loss: {loss.item():+.4f}. Gradient norm of all B: {norms['.B']:.3f}, of all A: {norms['.A']:.3f}.")
    out["step"] = "\n".join(["| sample | advantage | log pi before | after one step | change |", "|---|---|---|---|---|",
                             *(f"| {k} | {advantages[0, k]:+.3f} | {before[k]:.3f} | {after[k]:.3f} | {after[k] - before[k]:+.3f} |"
                               for k in range(K))])
    return out


def main(argv):
    """Print every part, and put it between its marks."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise trainer.StageError("usage: python -m extras.tutorial out/tiny   (a finished run of the miniature world)")
    for name, text in follow(argv[0]).items():
        put_table(PAGE, name, text)
        print(f"== {name}\n{text}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, data.DataError, trainer.StageError, modeling.ModelError, JudgeError) as problem:
        sys.exit(str(problem))
    except KeyboardInterrupt:
        print("\ntutorial: stopped; the page is as it was", file=sys.stderr)
        sys.exit(130)
