"""Small models with random weights, as transformers saves them, and a driver that runs Quire's decoder over shuffled pages."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quire.kernels import reference
from quire.kernels.layout import attention_batch
from quire.worker.config import ModelOptions
from quire.worker.kv_store import KVStore, PageShape
from quire.worker.linear import Linear
from quire.worker.model import DecoderModel
from quire.worker.weights import open_checkpoint

PAGE_SIZE = 4
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model whose every weight matters: norms and biases are random too, and activations keep their size."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, 1.0 if "embed" in name else 1.5 * weight.shape[1] ** -0.5)
            else:
                weight.normal_(0.0 if "bias" in name else 1.0, 0.3)
    return model


def tiny_checkpoint(path: Path) -> Path:
    """A directory with a Llama of two layers whose heads Triton's kernels can read (16 dimensions), and a tokenizer of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    random_model(LlamaConfig(**{**SIZES, "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2})).save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: SIZES["vocab_size"]]
    text = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    text.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=text).save_pretrained(path)
    return path


JSON_PIECES = ('{"', '":', '",', '"}', "},", "]}", "tr", "ue", "true", "nu", "ll", "null", "12", "ab", "abc", "\u010a\u0120")
BYTES_EOS, BYTES_VOCAB = 256 + len(JSON_PIECES), 300


def bytes_checkpoint(path: Path, max_len: int = 512) -> Path:
    """A directory with a Llama of two layers, and a tokenizer of all bytes and some pairs that JSON has. More logits than tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    sizes = SIZES | {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2, "max_position_embeddings": max_len}
    random_model(LlamaConfig(**sizes | {"vocab_size": BYTES_VOCAB}, eos_token_id=BYTES_EOS)).save_pretrained(path)
    vocab = {letter: i for i, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *JSON_PIECES])}
    merges = [next((p[:i], p[i:]) for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab) for p in JSON_PIECES]
    text = Tokenizer(models.BPE(vocab, merges))
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=text, eos_token="<eos>").save_pretrained(path)
    return path


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    return lambda x: F.linear(x, weight, bias)


def load(path: Path | str, max_model_len: int | None = None) -> DecoderModel:
    """Quire's model of a checkpoint, in float32 on the CPU with the reference kernels."""
    checkpoint = open_checkpoint(ModelOptions(str(path), max_model_len=max_model_len))
    model = DecoderModel(checkpoint.config, checkpoint, "cpu", torch.float32, plain_linear, reference)
    checkpoint.close()
    return model


class Pages:
    """A store full of NaN, and the sequences in it: their pages are taken in random order."""

    def __init__(self, model: DecoderModel, pages: int = 64, page_size: int = PAGE_SIZE, dtype: torch.dtype = torch.float32) -> None:
        config = model.config
        self.model = model
        self.kv = KVStore(PageShape(config.num_kv_heads, config.num_layers, page_size, config.head_dim, dtype), pages, "cpu")
        for layer in range(config.num_layers):
            self.kv.layer(layer).copy_(torch.tensor(float("nan")))
        self.free = list(range(pages))
        random.Random(0).shuffle(self.free)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, **chunks: list[int]) -> dict[str, torch.Tensor]:
        """Compute the next tokens of several sequences at once; the logits of each one's tokens. Single tokens go first."""
        size = self.kv.page_size
        rows = []
        for name, tokens in sorted(chunks.items(), key=lambda item: len(item[1]) > 1):
            table, start = self.tables.setdefault(name, []), self.lengths.get(name, 0)
            while len(table) * size < start + len(tokens):
                table.append(self.free.pop())
            rows.append((name, start, tokens))
            self.lengths[name] = start + len(tokens)
        batch = attention_batch([(start, len(tokens), self.tables[name]) for name, start, tokens in rows], size)
        ids = torch.tensor([token for _, _, tokens in rows for token in tokens])
        positions = torch.cat([torch.arange(start, start + len(tokens)) for _, start, tokens in rows])
        logits = self.model.logits(self.model.forward(ids, positions, batch, self.kv))
        return dict(zip([name for name, _, _ in rows], logits.split([len(tokens) for _, _, tokens in rows]), strict=True))

    def run(self, tokens: list[int], chunks: Iterable[int]) -> torch.Tensor:
        """Logits of all of `tokens`, computed in `chunks` (the last one repeats)."""
        found, at, size = [], 0, 0
        chunk = iter(chunks)
        while at < len(tokens):
            size = next(chunk, size)
            found.append(self.step(a=tokens[at : at + size])["a"])
            at += size
        return torch.cat(found)
