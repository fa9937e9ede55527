"""Make preference data and trials on it, and the losses of pairs as their papers define them, in plain torch."""

import copy
import json

import torch
from torch.nn.functional import logsigmoid


def pair_rows(number, wrong=1):
    """Return rows of prompt, chosen and rejected: the right sum and a wrong one, of different lengths."""
    return [
        {"prompt": f"What is {i} plus {i}?", "chosen": f"It is {i + i}.", "rejected": f"Well, {i + i + wrong}, I think."}
        for i in range(number)
    ]


def as_messages(row):
    """Return the row as TRL's conversational format."""
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **answers}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def preference_values(values, data, **preference):
    """Return the values of a config that learns from the pairs in `data`."""
    changed = copy.deepcopy(values)
    changed["data"].update(train=str(data), format="preference")
    changed["preference"] = preference
    return changed


def sum_and_count(model, sample):
    """Return the summed log probability of a sample's targets, and their number, from the library's model."""
    ids = torch.tensor(sample.input_ids, dtype=torch.long)
    targets = torch.tensor(sample.is_target)[1:]
    logp = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logp.gather(1, ids[1:, None])[:, 0][targets].sum(), int(targets.sum())


def dpo_of_paper(beta, policy, reference, smoothing=0.0):
    """Return equation 7 of the DPO paper for one pair, with the labels smoothed. policy, reference: (chosen, rejected)."""
    margin = beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def orpo_of_paper(weight, chosen, rejected):
    """Return equations 6 and 7 of the ORPO paper for one pair. chosen, rejected: (summed log p, number of tokens)."""
    means = [total / count for total, count in (chosen, rejected)]
    odds = [mean.exp() / (1 - mean.exp()) for mean in means]
    return -means[0] - weight * logsigmoid(torch.log(odds[0] / odds[1]))
