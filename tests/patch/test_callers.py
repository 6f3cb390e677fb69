"""Callers that only see a PreTrainedModel, and weights that are not plain tensors: all works after apply as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TRIANGLE
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import sparsekit
from sparsekit import SparsekitError
from sparsekit.models import tiny

TOKENS = 200
SPARSE = {"layers": {"1-3": TRIANGLE}}
WITHOUT = "needs pip install 'sparsekit-attention[interop]'"


def _ids(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(3, 250, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token n is the word `wn`; the first three are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(3, 256))]
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="w3"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.model_max_length = 4096
    return made


def _text(ids: Tensor) -> str:
    return " ".join(f"w{n}" for n in ids.tolist())


@torch.no_grad()
def _logprobs(model: PreTrainedModel, context: Tensor, continuation: Tensor) -> Tensor:
    """Of the continuation's tokens, the text alone in a batch of one: what every caller below must find."""
    ids = torch.cat([context, continuation])
    logits = model(input_ids=ids[None]).logits[0, -len(continuation) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, continuation[:, None])[:, 0]


# ---- transformers' own callers


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    """Prompts of two lengths, one by one and padded into one batch."""
    prompts = [_ids(), _ids(140, seed=1)]
    tokenizer.padding_side = "left"
    with sparsekit.apply(model, SPARSE) as handle:
        single = [model.generate(ids[None], max_new_tokens=8, do_sample=False)[0, len(ids) :] for ids in prompts]
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=batch_size)
        said = pipe([_text(ids) for ids in prompts], max_new_tokens=8, do_sample=False, return_full_text=False)
        assert [row.ran for row in handle.report().layers] == ["dense"] + ["sparse"] * 3
    for [answer], tokens in zip(said, single, strict=True):
        assert answer["generated_text"].split() == tokenizer.decode(tokens, skip_special_tokens=True).split()


def test_trainer_evaluates(model: PreTrainedModel, tmp_path: Path) -> None:
    """Trainer's evaluation loop: batches, eval mode, no gradients, the loss of labels; padding is labelled -100."""
    rows = []
    for n, tokens in enumerate([TOKENS, 150, 120]):
        ids = torch.nn.functional.pad(_ids(tokens, seed=n), (0, TOKENS - tokens))
        mask = (torch.arange(TOKENS) < tokens).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model=model, args=arguments)
    dense = trainer.evaluate(rows)["eval_loss"]
    with sparsekit.apply(model, SPARSE) as handle:
        loss = trainer.evaluate(rows)["eval_loss"]
        total, count = 0.0, 0
        for row in rows:
            ids = row["input_ids"][row["attention_mask"] == 1]
            total -= float(_logprobs(model, ids[:1], ids[1:]).sum())
            count += len(ids) - 1
        assert {row.ran for row in handle.report().layers} == {"dense", "sparse"}
        with pytest.raises(SparsekitError, match="sparse attention is forward only"):
            Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert loss == pytest.approx(total / count, abs=1e-5)
    assert loss != pytest.approx(dense, abs=1e-4)


# ---- callers of other libraries, call by call


def test_reinforcement_learning_as_in_trl(model: PreTrainedModel) -> None:
    """Rollouts from left-padded prompts, their log-probabilities, those of a copied reference model, then a step.

    A copy runs the model's own attention after `remove`; gradients need `handle.pause()`.
    """
    prompts = torch.zeros(2, TOKENS, dtype=torch.long)
    prompts[0], prompts[1, 60:] = _ids(), _ids(140, seed=1)
    mask = (prompts != 0).long()
    with sparsekit.apply(model, SPARSE) as handle:
        reference = copy.deepcopy(model).eval()
        sparsekit.remove(reference)
        options = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            whole = model.generate(input_ids=prompts, attention_mask=mask, generation_config=options)
            rollouts, seen = whole[:, TOKENS:], torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], 1)

            def logprobs(policy: PreTrainedModel) -> Tensor:
                logits = policy(input_ids=whole, attention_mask=seen, logits_to_keep=7).logits[:, :-1]
                return logits.log_softmax(-1).gather(-1, rollouts[..., None])[..., 0]

            ours, theirs = logprobs(model), logprobs(reference)
            expected = _logprobs(model, prompts[1, 60:], rollouts[1])
            with handle.pause():
                assert torch.equal(logprobs(model), theirs)
        # Without position_ids a padded row is rotated by its padding, which changes nothing but rounding.
        assert float((ours[1] - expected).abs().max()) < 1e-5
        assert float((ours - theirs).abs().max()) > 1e-4
        model.train()
        with pytest.raises(SparsekitError, match="sparse attention is forward only"):
            model(input_ids=whole, attention_mask=seen)
        with handle.pause():
            model(input_ids=whole, attention_mask=seen, labels=whole).loss.backward()
        assert model.lm_head.weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_loglikelihoods_of_a_masked_batch(model: PreTrainedModel, side: str) -> None:
    """Context and continuation in a padded batch, `model(input_ids, attention_mask).logits`."""
    pairs = [(_ids(170, seed=1), _ids(30, seed=2)), (_ids(95, seed=3), _ids(11, seed=4))]
    batch, mask = torch.zeros(2, TOKENS, dtype=torch.long), torch.zeros(2, TOKENS, dtype=torch.long)
    for row, (context, continuation) in enumerate(pairs):
        ids = torch.cat([context, continuation])
        at = slice(TOKENS - len(ids), TOKENS) if side == "left" else slice(0, len(ids))
        batch[row, at], mask[row, at] = ids, 1
    with sparsekit.apply(model, SPARSE) as handle:
        logits = model(input_ids=batch, attention_mask=mask).logits.log_softmax(-1)
        assert {row.ran for row in handle.report().layers} == {"dense", "sparse"}
        for row, (context, continuation) in enumerate(pairs):
            end = TOKENS if side == "left" else len(context) + len(continuation)
            found = logits[row, end - len(continuation) - 1 : end - 1].gather(-1, continuation[:, None])[:, 0]
            assert float((found - _logprobs(model, context, continuation)).abs().max()) < 1e-5


@torch.no_grad()
def test_loglikelihoods_of_a_batch_without_mask(model: PreTrainedModel) -> None:
    """lm-eval pads on the right and passes no mask: then the padding is prompt, and the prompt ends where it ends.

    Patterns that count from the prompt's end (triangle's last rows) see another prompt: alone, or with a batch size of
    1, the result is the sample's own. Those that do not count from there are the same in any batch.
    """
    ids = _ids(120)
    padded = torch.nn.functional.pad(ids, (0, 80))
    for pattern, same in ((TRIANGLE, False), ({"name": "a_shape", "window_tokens": 40}, True)):
        with sparsekit.apply(model, {"default": pattern}):
            alone, batched = model(ids[None]).logits[0], model(padded[None]).logits[0, :120]
        assert (float((alone - batched).abs().max()) < 1e-5) is same


def test_lm_eval(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The harness itself: log-likelihoods, one request a batch."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason=WITHOUT)
    instance = pytest.importorskip("lm_eval.api.instance", reason=WITHOUT).Instance
    pairs = [(_ids(170, seed=1), _ids(30, seed=2)), (_ids(95, seed=3), _ids(11, seed=4))]
    with sparsekit.apply(model, SPARSE) as handle:
        harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        requests = [
            instance("loglikelihood", {}, (_text(context), " " + _text(continuation)), n)
            for n, (context, continuation) in enumerate(pairs)
        ]
        found = harness.loglikelihood(requests, disable_tqdm=True)
        assert {row.ran for row in handle.report().layers} == {"dense", "sparse"}
        for (logprob, _), (context, continuation) in zip(found, pairs, strict=True):
            # The harness leaves out the last token, so its prompt is one shorter.
            ids = torch.cat([context, continuation])[:-1]
            with torch.no_grad():
                logits = model(ids[None]).logits[0, -len(continuation) :].log_softmax(-1)
            assert logprob == pytest.approx(float(logits.gather(-1, continuation[:, None]).sum()), abs=1e-3)


# ---- quantised weights


def _write_gguf(file: Path, layers: int = 2, width: int = 64, vocab: int = 256) -> None:
    """A llama of random weights, 4 heads over 2 key heads of size 16, matrices in Q8_0."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    rng = np.random.default_rng(0)
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocab)
    shapes = {"token_embd": (vocab, width), "output": (vocab, width)}
    for n in range(layers):
        shapes |= {f"blk.{n}.attn_{name}": (rows, width) for name, rows in (("q", 64), ("k", 32), ("v", 32))}
        shapes |= {f"blk.{n}.attn_output": (width, 64), f"blk.{n}.ffn_down": (width, 128)}
        shapes |= {f"blk.{n}.ffn_{name}": (128, width) for name in ("gate", "up")}
    for name, shape in shapes.items():
        weight = quantize(rng.normal(0, 0.1, shape).astype(np.float32), GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", weight, raw_dtype=GGMLQuantizationType.Q8_0)
    norms = [f"blk.{n}.{part}_norm" for n in range(layers) for part in ("attn", "ffn")] + ["output_norm"]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_quantised(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """Dense is the model itself, sparse is the mask that it should be, and remove brings the model back."""
    ids = _ids()[None]
    with torch.inference_mode():
        dense = model(ids).logits
        with sparsekit.apply(model, {"default": "dense"}):
            assert torch.equal(model(ids).logits, dense)
        with sparsekit.apply(model, config) as handle:
            sparse = model(ids).logits
            assert "sparse" in {row.ran for row in handle.report().layers}
            assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, TOKENS + 3)
        i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)[None]
        kept = (j <= i) & ((j < 8) | (i - j < 40) | (i >= TOKENS - 20))
        explicit = model(ids, attention_mask=kept[None, None]).logits
        assert float((sparse - explicit).abs().max()) < 1e-4 * max(1.0, float(dense.abs().max()))
        assert float((sparse - dense).abs().max()) > 1e-3
        assert torch.equal(model(ids).logits, dense)


def test_gguf_weights_dequantised(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (2, 4)
    _check_quantised(model.eval(), {"default": TRIANGLE})


def test_torchao_int8_weights(model: PreTrainedModel) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason=WITHOUT)
    plain = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter
    assert not torch.equal(weight.dequantize(), plain)
    _check_quantised(model, {"default": TRIANGLE})
