"""Function vectors: a task in one vector.

Todd et al. (2023), "Function Vectors in Large Language Models": a few attention heads carry which task the examples of a prompt show,
the same heads for many tasks. The sum of what they add to the stream at the last token, averaged over prompts with examples, makes
the model do the task where it is added to a prompt without any.

Heads are chosen by attribution patching (to first order what the paper's average indirect effect is), for each task and, as in the
paper, over all tasks at once; words tested are not among those the vector is made from. Layer, factor and number of heads are
the same for all tasks.

    python studies/function_vectors.py [--figure FILE]
"""

import random

import torch
from study import Study
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.methods import attribution_patching, log_probability
from nnatomy.plots import heat_map

TASKS = {
    "plural": "dog dogs cat cats car cars book books tree trees house houses bird birds ship ships hand hands door doors "
    "king kings road roads river rivers song songs star stars cup cups table tables horse horses apple apples stone stones",
    "capital": "France Paris Italy Rome Germany Berlin Japan Tokyo Russia Moscow Greece Athens Austria Vienna Portugal Lisbon "
    "Hungary Budapest Sweden Stockholm Cuba Havana Kenya Nairobi England London Norway Oslo Denmark Copenhagen China Beijing "
    "Spain Madrid Egypt Cairo Ireland Dublin Peru Lima",
    "past tense": "walk walked play played jump jumped look looked talk talked open opened call called help helped work worked "
    "start started move moved live lived want wanted turn turned ask asked show showed need needed close closed clean cleaned "
    "paint painted",
    "opposite": "hot cold big small fast slow up down good bad happy sad light dark open closed left right old young rich poor "
    "hard soft early late full empty high low strong weak clean dirty win lose love hate day night",
}
LAYER, FACTOR, HEADS, SHOTS = 16, 2.0, 10, 4

Pairs = list[tuple[str, str]]


def prompt(shots: Pairs, question: str) -> str:
    return "".join(f"Q: {word}\nA: {answer}\n\n" for word, answer in shots) + f"Q: {question}\nA:"


def prompts(pairs: Pairs, shuffled: bool = False) -> list[str]:
    """Of each of the first six words, with examples of the others; `shuffled`: with the answers one example off."""
    made = []
    for i, (question, _) in enumerate(pairs[:6]):
        words, answers = zip(*random.Random(i).sample(pairs[:i] + pairs[i + 1 :], SHOTS), strict=True)
        made.append(prompt(list(zip(words, answers[1:] + answers[:1] if shuffled else answers, strict=True)), question))
    return made


def vector(model: StandardizedTransformer, pairs: Pairs, heads: list[tuple[int, int]]) -> Tensor:
    """The sum of what the heads add to the stream at the last token, averaged over prompts: (hidden)."""
    with torch.no_grad(), model.trace(prompts(pairs)):
        given = [model.heads_output[i][:, -1].mean(0) for i in range(model.num_layers)]  # (head, head_dim)
    total = torch.zeros(model.hidden_size)
    for layer, head in heads:
        # The output projection of one head: its columns of the weight.
        weight = model.layers[layer].self_attn.o_proj.module.weight.detach()
        columns = weight.unflatten(1, (model.num_heads, model.head_dim))[:, head]
        total += columns @ given[layer][head]
    return total


def best(effects: Tensor) -> list[tuple[int, int]]:
    """The heads with the largest values."""
    return [divmod(int(i), effects.shape[1]) for i in effects.flatten().topk(HEADS).indices]


@torch.no_grad()
def accuracy(
    model: StandardizedTransformer, asked: list[str], answers: list[str], added: Tensor | None = None
) -> float:
    """How often the first token of the answer is the most probable one."""
    with model.trace(asked):
        if added is not None:
            model.steer(LAYER, added, factor=FACTOR, token_positions=-1)
        first = model.logits[:, -1].argmax(-1)
    return sum(
        int(i) == model.tokenizer.encode(f" {answer}")[0] for i, answer in zip(first, answers, strict=True)
    ) / len(answers)


def main() -> None:
    study = Study(__doc__)
    model = study.model()
    tasks = {name: list(zip(words.split()[::2], words.split()[1::2], strict=True)) for name, words in TASKS.items()}
    known = {name: pairs[:10] for name, pairs in tasks.items()}
    effects = {}
    for name, pairs in known.items():
        metric = log_probability([f" {answer}" for _, answer in pairs[:6]], model)
        found = attribution_patching(
            model, prompts(pairs), prompts(pairs, shuffled=True), metric=metric, point="heads_output"
        )
        effects[name] = found.effect[:, :, -1].mean(0)  # at the last token: (layer, head)
    common = best(torch.stack(list(effects.values())).mean(0))
    chosen = {name: best(effect) for name, effect in effects.items()}
    shared = [head for head in common if sum(head in heads for heads in chosen.values()) >= 3]
    print(f"| heads of three tasks or more | {', '.join(f'L{layer}H{head}' for layer, head in shared)} | |")
    drawn = best(torch.rand(model.num_layers, model.num_heads))

    vectors = {name: vector(model, pairs, chosen[name]) for name, pairs in known.items()}
    table = []
    for name, pairs in tasks.items():
        words, answers = (list(part) for part in zip(*pairs[10:], strict=True))
        asked = [prompt([], word) for word in words]
        row = {
            "examples": accuracy(model, [prompt(known[name][:SHOTS], word) for word in words], answers),
            "none": accuracy(model, asked, answers),
            "random heads": accuracy(model, asked, answers, vector(model, known[name], drawn)),
            "common heads": accuracy(model, asked, answers, vector(model, known[name], common)),
        }
        row |= {f"+ {other}": accuracy(model, asked, answers, added) for other, added in vectors.items()}
        table.append(list(row.values()))
        print(f"| {name} | {', '.join(f'{kind} {value:.1f}' for kind, value in row.items())} | |", flush=True)
    values = torch.tensor(table)  # (task, kind of prompt)
    own = values[:, 4:].diagonal()
    study.check("heads among the ten best of three tasks or more", len(shared), at_least=3)
    study.check("accuracy with four examples, mean over tasks", values[:, 0].mean(), at_least=0.7)
    study.check("without any", values[:, 1].mean(), at_most=0.1)
    study.check("with the task's own vector", own.mean(), at_least=0.25)
    study.check("with the vectors of the other tasks", (values[:, 4:].sum() - own.sum()) / 12, at_most=0.1)
    study.check("with a vector of random heads", values[:, 2].mean(), at_most=0.1)
    study.check("with the task's own vector, of the heads common to all tasks", values[:, 3].mean(), at_least=0.2)
    study.check("the best task, with its own vector", own.max(), at_least=0.6)
    study.check("the worst task, with its own vector", own.min())
    study.finish(
        heat_map(
            values,
            rows=list(tasks),
            columns=list(row),
            texts=[[f"{value:.1f}" for value in values_] for values_ in table],
            row_title="task",
            column_title="prompt",
            title="How often the first answer is right",
            value_name="accuracy",
        )
    )


if __name__ == "__main__":
    main()
