"""GGUF: every supported type against ggml's formulas, whole models against transformers, and files that lie about themselves."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, RopeScalingType
from gguf.quants import quant_shape_to_byte_shape
from tiny_models import SIZES, Pages, load, random_model
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from quire.worker import gguf_weights
from quire.worker.gguf_weights import GgufCheckpoint
from quire.worker.model_config import UnsupportedModel
from quire.worker.shard import Part
from quire.worker.text.gguf_header import GgufError, read_header

TOKENS = [int(t) for t in torch.randint(97, (30,), generator=torch.Generator().manual_seed(2))]
TO_GGUF = {hugging_face: ours for ours, hugging_face in gguf_weights._IN_LAYER.items()}
TOP = {hugging_face: ours for ours, hugging_face in gguf_weights._TOP.items()}


def gguf_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    middle, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{TO_GGUF[middle]}.{kind}"


def pairs_first(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of q and k of a llama model."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def writer_for(path: Path, arch: str, config: Any, eot: int | None = None) -> GGUFWriter:
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if eot is not None:
        writer.add_eot_token_id(eot)
    return writer


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_model(writer: GGUFWriter, model: PreTrainedModel, arch: str) -> None:
    config = model.config
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ".q_proj." in name:
            weight = pairs_first(weight, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            weight = pairs_first(weight, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), weight.contiguous().numpy())


def linear_scaling(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


def yarn_scaling(writer: GGUFWriter) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)


def llama3_divisors(writer: GGUFWriter) -> None:
    """As the converter writes them: what transformers' frequencies are, against the plain ones."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4})).inv_freq
    stretched = LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters=LLAMA3)).inv_freq
    writer.add_tensor("rope_freqs.weight", (plain / stretched).numpy())


def head_size(writer: GGUFWriter) -> None:
    writer.add_key_length(16)
    writer.add_value_length(16)


def nothing(writer: GGUFWriter) -> None:
    pass


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"rope_type": "llama3", "rope_theta": 1e4}  # type: ignore[dict-item]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("arch", "config", "also"),
    [
        ("llama", LlamaConfig(**SIZES), nothing),
        ("llama", LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True), nothing),
        ("llama", LlamaConfig(**SIZES, rope_parameters=LINEAR), linear_scaling),
        ("llama", LlamaConfig(**SIZES, rope_parameters=YARN), yarn_scaling),
        ("llama", LlamaConfig(**SIZES, rope_parameters=LLAMA3), llama3_divisors),
        ("qwen2", Qwen2Config(**SIZES), nothing),
        ("qwen3", Qwen3Config(**SIZES, head_dim=16), head_size),
    ],
    ids=["llama", "llama, biases and tied head", "linear", "yarn", "llama3", "qwen2", "qwen3"],
)
def test_logits_equal_transformers(arch: str, config: Any, also: Callable[[GGUFWriter], None], tmp_path: Path) -> None:
    model = random_model(config)
    writer = writer_for(tmp_path / "tiny.gguf", arch, config, eot=5)
    also(writer)
    add_model(writer, model, arch)
    finish(writer)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    ours = load(tmp_path / "tiny.gguf")
    torch.testing.assert_close(Pages(ours).run(TOKENS, [20, 9, 1]), expected, atol=1e-4, rtol=0)
    found = ours.config
    assert (found.eos_token_ids, found.bos_token_id, found.name, found.dtype) == ((2, 5), 1, "tiny", "float32")


# --- types: each block decoded as ggml-quants.c describes it, one number at a time ---


def half(data: bytes) -> float:
    return float(np.frombuffer(data, np.float16)[0])


def q8_0(b: bytes) -> list[float]:
    return [half(b[:2]) * q for q in struct.unpack("32b", b[2:])]


def q4_0(b: bytes) -> list[float]:
    return [half(b[:2]) * (q - 8) for q in [x & 15 for x in b[2:]] + [x >> 4 for x in b[2:]]]


def q4_1(b: bytes) -> list[float]:
    return [half(b[:2]) * q + half(b[2:4]) for q in [x & 15 for x in b[4:]] + [x >> 4 for x in b[4:]]]


def q4_k(b: bytes) -> list[float]:
    d, least, s, qs = half(b[:2]), half(b[2:4]), b[4:16], b[16:]
    out: list[float] = []
    for j in range(8):
        if j < 4:
            scale, minimum = s[j] & 63, s[j + 4] & 63
        else:
            scale, minimum = (s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4)
        part = qs[32 * (j // 2) : 32 * (j // 2) + 32]
        out += [d * scale * (x >> 4 if j % 2 else x & 15) - least * minimum for x in part]
    return out


def q6_k(b: bytes) -> list[float]:
    ql, qh, scales, d = b[:128], b[128:192], struct.unpack("16b", b[192:208]), half(b[208:])
    out = [0.0] * 256
    for half_block in range(2):
        for quarter in range(4):
            for i in range(32):
                low = ql[64 * half_block + 32 * (quarter % 2) + i]
                low = low >> 4 if quarter >= 2 else low & 15
                high = qh[32 * half_block + i] >> 2 * quarter & 3
                scale = scales[8 * half_block + 2 * quarter + i // 16]
                out[128 * half_block + 32 * quarter + i] = d * scale * ((low | high << 4) - 32)
    return out


def f32(b: bytes) -> list[float]:
    return [struct.unpack("<f", b)[0]]


def f16(b: bytes) -> list[float]:
    return [half(b)]


def bf16(b: bytes) -> list[float]:
    return [struct.unpack("<f", b"\0\0" + b)[0]]


# type -> (the tensor that is stored so, one block decoded, where the float16 numbers of a block are)
TYPES: dict[Type, tuple[str, Callable[[bytes], list[float]], tuple[int, ...]]] = {
    Type.F32: ("model.layers.0.self_attn.v_proj.weight", f32, ()),
    Type.F16: ("model.layers.0.self_attn.o_proj.weight", f16, (0,)),
    Type.BF16: ("model.layers.0.mlp.gate_proj.weight", bf16, ()),
    Type.Q8_0: ("model.layers.0.mlp.up_proj.weight", q8_0, (0,)),
    Type.Q4_0: ("model.layers.0.mlp.down_proj.weight", q4_0, (0,)),
    Type.Q4_1: ("model.layers.1.mlp.down_proj.weight", q4_1, (0, 2)),
    Type.Q4_K: ("model.layers.1.mlp.up_proj.weight", q4_k, (0, 2)),
    Type.Q6_K: ("model.layers.1.mlp.gate_proj.weight", q6_k, (208,)),
}


def random_blocks(shape: tuple[int, ...], kind: Type, halves: tuple[int, ...]) -> np.ndarray:
    """Random bytes that are finite numbers, in blocks of `kind`."""
    name, _, block_bytes = gguf_weights._TYPES[kind]
    random_ = np.random.default_rng(kind)
    if name in ("F32", "BF16"):
        values = random_.standard_normal(shape).astype(np.float32)
        return values if name == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    byte_shape = quant_shape_to_byte_shape(shape, kind)
    blocks = random_.integers(0, 256, (int(np.prod(byte_shape)) // block_bytes, block_bytes))
    blocks = blocks.astype(np.uint8)
    for at in halves:
        blocks[:, at : at + 2] = random_.standard_normal(len(blocks)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(byte_shape)


def test_every_type_is_read_as_ggml_defines_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_weights, "_PIECE_ELEMENTS", 768)  # several pieces, the last one short
    config = LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_key_value_heads": 4})
    writer = writer_for(tmp_path / "types.gguf", "llama", config)
    stored: dict[str, bytes] = {}
    by_name = {name: (kind, halves) for kind, (name, _, halves) in TYPES.items()}
    for name, weight in random_model(config).state_dict().items():
        if name in by_name:
            kind, halves = by_name[name]
            blocks = random_blocks(tuple(weight.shape), kind, halves)
            stored[name] = blocks.tobytes()
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), weight.numpy())
    finish(writer)

    checkpoint = GgufCheckpoint(tmp_path / "types.gguf")
    for kind, (name, decode, _) in TYPES.items():
        size = gguf_weights._TYPES[kind][2]
        data = stored[name]
        expected = [value for at in range(0, len(data), size) for value in decode(data[at : at + size])]
        got = checkpoint.tensor(name, torch.float32)
        torch.testing.assert_close(got, torch.tensor(expected).view(256, 256), atol=1e-4, rtol=1e-5, msg=lambda m, k=kind: f"{k.name}: {m}")
        for part in (Part(0, 64, 192), Part(1, 0, 96), Part(1, 100, 200)):  # of rows some blocks, their ends cut where that must be
            wanted = got.narrow(part.dim, part.start, part.stop - part.start)
            assert torch.equal(checkpoint.tensor(name, torch.float32, part), wanted), kind.name
    assert checkpoint.tensor(name, torch.bfloat16).dtype == torch.bfloat16
    assert checkpoint.config.dtype == "bfloat16"  # quantised weights have no type of their own on a GPU


# --- refusals ---


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good file."""
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1})
    writer = writer_for(path, "llama", config)
    add_model(writer, random_model(config), "llama")
    finish(writer)
    return path.read_bytes()


def opened(tmp_path: Path, data: bytes) -> GgufCheckpoint:
    (tmp_path / "m.gguf").write_bytes(data)
    return GgufCheckpoint(tmp_path / "m.gguf")


def test_a_file_cut_anywhere_is_refused(plain: bytes, tmp_path: Path) -> None:
    opened(tmp_path, plain)
    for size in [*range(200), *range(200, len(plain), 997), len(plain) - 33]:
        with pytest.raises(UnsupportedModel, match=r"m\.gguf|runs past the end"):
            opened(tmp_path, plain[:size])


def test_a_damaged_header_is_read_or_refused_but_nothing_else(plain: bytes, tmp_path: Path) -> None:
    start = min(info.offset for info in read_header_of(plain, tmp_path).values())
    chance = random.Random(0)
    refused = 0
    for _ in range(600):
        data = bytearray(plain)
        for _ in range(chance.choice((1, 1, 8))):
            data[chance.randrange(start)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        try:
            opened(tmp_path, bytes(data))
        except UnsupportedModel:
            refused += 1
    assert refused > 100


def read_header_of(data: bytes, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "h.gguf").write_bytes(data)
    return dict(read_header(tmp_path / "h.gguf").tensors)


def header(*metadata: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(metadata) if count is None else count) + b"".join(metadata) + bytes(64)


def entry(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "version 50331648"),
        (header(count=2**60), "more than the file can hold"),
        (header(tensors=2**40), "more than the file can hold"),
        (header(entry("a", 8, struct.pack("<Q", 2**63))), "past the end"),
        (header(entry("a", 9, struct.pack("<IQQ", 8, 1, 900))), "past the end"),
        (header(entry("a", 9, struct.pack("<IQ", 8, 2**61))), "more than the file can hold"),
        (header(entry("a", 9, struct.pack("<IQ", 4, 2**61))), "more than the file can hold"),
        (header(entry("a", 9, struct.pack("<IQ", 9, 1))), "type 9 is not supported"),
        (header(entry("a", 99, b"")), "type 99 is not supported"),
        (header(entry("a", 0, b"\1"), entry("a", 0, b"\2")), "stands twice"),
        (header(entry("general.alignment", 4, struct.pack("<I", 3))), "power of two"),
    ],
)
def test_headers_that_lie(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "h.gguf").write_bytes(data)
    with pytest.raises(GgufError, match=message):
        read_header(tmp_path / "h.gguf")


def test_rows_that_are_not_whole_blocks_are_refused(tmp_path: Path) -> None:
    info = struct.pack("<Q", 13) + b"output.weight" + struct.pack("<IQQIQ", 2, 33, 1, Type.Q8_0, 0)
    with pytest.raises(UnsupportedModel, match=r"output\.weight has rows of 33, not whole blocks of Q8_0"):
        opened(tmp_path, header(info, tensors=1, count=0) + bytes(100))


def test_metadata_arrives_with_its_values(tmp_path: Path) -> None:
    values = [
        entry("text", 8, struct.pack("<Q", 3) + "dé".encode()),
        entry("numbers", 9, struct.pack("<IQ3h", 3, 3, 1, -2, 3)),
        entry("words", 9, struct.pack("<IQ", 8, 2) + struct.pack("<Q", 1) + b"a" + struct.pack("<Q", 0)),
        entry("yes", 7, b"\1"),
        entry("real", 12, struct.pack("<d", 0.5)),
    ]
    (tmp_path / "h.gguf").write_bytes(header(*values))
    expected = {"text": "dé", "numbers": [1, -2, 3], "words": ["a", ""], "yes": True, "real": 0.5}
    assert read_header(tmp_path / "h.gguf").metadata == expected


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: w.add_expert_count(8), r"llama\.expert_count = 8"),
        (lambda w: w.add_rope_scaling_type(RopeScalingType.LONGROPE), r"llama\.rope\.scaling\.type = longrope"),
        (lambda w: w.add_rope_dimension_count(4), r"llama\.rope\.dimension_count"),
        (lambda w: w.add_value_length(4), r"llama\.attention\.value_length"),
        (lambda w: w.add_final_logit_softcapping(30.0), r"llama\.final_logit_softcapping = 30"),
        (lambda w: w.add_uint16("split.count", 3), r"split\.count = 3"),
        (lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((4, 32, 32), np.float32)), r"tensor blk\.0\.ffn_gate_exps\.weight"),
        (lambda w: w.add_tensor("blk.7.attn_q.weight", np.zeros((32, 32), np.float32)), r"model\.layers\.7\.self_attn\.q_proj\.weight"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(31, np.float32)), r"q_proj\.bias has shape \[31\]"),
        (
            lambda w: w.add_tensor("output.weight", np.zeros((97, 22), np.uint8), raw_dtype=Type.Q5_0),
            r"output\.weight is of type Q5_0; supported are F32",
        ),
    ],
)
def test_what_is_not_supported_is_named(add: Callable[[GGUFWriter], None], message: str, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1}, tie_word_embeddings=True)
    writer = writer_for(tmp_path / "m.gguf", "llama", config)
    add_model(writer, random_model(config), "llama")
    add(writer)
    finish(writer)
    with pytest.raises(UnsupportedModel, match=message):
        GgufCheckpoint(tmp_path / "m.gguf")


def test_another_architecture_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "gemma2")
    finish(writer)
    with pytest.raises(UnsupportedModel, match="architecture gemma2"):
        GgufCheckpoint(tmp_path / "m.gguf")
