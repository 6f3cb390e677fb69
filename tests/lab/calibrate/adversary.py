"""A model built by hand in which one head alone carries retrieval over the middle section, and its task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sparsekit import models
from sparsekit.lab.tasks import Sample, Task

TRIANGLE = {"name": "triangle", "sink_tokens": 4, "window_tokens": 64, "last_tokens": 16}
WORDS = ["<pad>", "<s>", "</s>", "x", "R", "?", *(f"f{v}" for v in range(8)), *(f"a{v}" for v in range(8))]


class Words:
    """A tokenizer of `WORDS`, parted by blanks."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True, return_tensors=None):
        ids = [WORDS.index(word) for word in text.split()]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(WORDS[int(i)] for i in ids)


@dataclass(frozen=True)
class Relayed(Task):
    """A fact early in the text, a relay late in it but before the last rows, and a question."""

    def build(self, rng, units):
        value, early, late = rng.randrange(1, 8), rng.uniform(0.05, 0.2), rng.uniform(0.6, 0.8)
        words = ["x"] * units
        words.insert(round(late * units), "R")
        words.insert(round(early * units), f"f{value}")
        return Sample(" ".join([*words, "?"]), (f"a{value}",))


RELAYED = Relayed("relayed", max_new_tokens=1)


def relay_model() -> tuple[PreTrainedModel, Words]:
    """Layer 1: the relay reads the fact, over the middle section. Layer 2: the question reads the relay.

    Layer 0 spreads a large gradient evenly over all pairs, so that the one pair that matters in layer 1 looks small.
    """
    model = models.tiny(
        "llama",
        num_hidden_layers=3,
        vocab_size=len(WORDS),
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},  # dimension 5 of a head hardly turns
    )
    fact, relay, question, bias, value, relayed, out, diffuse = 0, 1, 2, 3, 8, 16, 24, 40
    strong = 40.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        embedding = model.model.embed_tokens.weight
        embedding[:, bias] = 30.0  # so that norms are about the same for all tokens
        embedding[WORDS.index("R"), relay] = embedding[WORDS.index("?"), question] = 1.0
        for v in range(8):
            embedding[WORDS.index(f"f{v}"), [fact, value + v]] = 1.0
            model.lm_head.weight[WORDS.index(f"a{v}"), out + v] = 300.0
        uniform, match = 32, 0  # first feature of head 2 and of head 0
        first, second, third = (layer.self_attn for layer in model.model.layers)
        first.v_proj.weight[16, bias] = 1.0
        first.o_proj.weight[diffuse, uniform] = 1.0
        third.v_proj.weight[16, diffuse] = 1.0
        third.o_proj.weight[out : out + 8, uniform] = 2.0
        for layer, asks, has, source, target, gain in (
            (second, relay, fact, value, relayed, 4.0),
            (third, question, relay, relayed, out, 0.4),
        ):
            layer.q_proj.weight[match + 5, asks] = layer.k_proj.weight[match + 5, has] = strong
            for v in range(8):
                layer.v_proj.weight[v, source + v] = 1.0
                layer.o_proj.weight[target + v, match + v] = gain
    return model, Words()
