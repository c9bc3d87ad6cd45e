"""Ways to damage a model, an adapter, a manifest, data or a recipe. Each takes a drawn seed.

A damage function changes files below a folder and returns what it did, for the test's message.
"""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, random.Random], str]
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WIDTHS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "num_hidden_layers", "vocab_size", "head_dim",
)  # fmt: skip
BAD_NUMBERS = (10**30, 10**9, 2**63, -1, 0, 1.5, "32", None, [], {}, True, 1e308)


def read_shard(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_shard(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def names(header: dict) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def of_header(change: Callable[[dict, random.Random], str]) -> Callable[[str], Damage]:
    """Of a function that changes a shard's header in place and tells how: a damage by file name."""

    def of_file(name: str) -> Damage:
        def damage(folder: Path, draw: random.Random) -> str:
            header, data = read_shard(folder / name)
            told = change(header, draw)
            write_shard(folder / name, header, data)
            return f"{name}: {told}"

        return damage

    return of_file


def truncated(name: str) -> Damage:
    def damage(folder: Path, draw: random.Random) -> str:
        raw = (folder / name).read_bytes()
        keep = draw.randrange(len(raw))
        (folder / name).write_bytes(raw[:keep])
        return f"{name} cut to {keep} of {len(raw)} bytes"

    return damage


def empty(*choices: str) -> Damage:
    def damage(folder: Path, draw: random.Random) -> str:
        name = draw.choice(choices)
        (folder / name).write_bytes(b"")
        return f"{name} empty"

    return damage


def gone(*choices: str) -> Damage:
    def damage(folder: Path, draw: random.Random) -> str:
        name = draw.choice(choices)
        (folder / name).unlink()
        return f"{name} removed"

    return damage


def not_utf8(*choices: str) -> Damage:
    def damage(folder: Path, draw: random.Random) -> str:
        name = draw.choice(choices)
        raw = bytearray((folder / name).read_bytes())
        raw[draw.randrange(1, min(40, len(raw)))] = 0xFF
        (folder / name).write_bytes(raw)
        return f"{name} is not UTF-8"

    return damage


def not_json(*choices: str) -> Damage:
    texts = ("{", "null", "[1, 2]", '"text"', "12", '{"a": 1', "[" * 100_000, '{"a":' * 50_000)

    def damage(folder: Path, draw: random.Random) -> str:
        name, text = draw.choice(choices), draw.choice(texts)
        (folder / name).write_text(text)
        return f"{name} holds {text[:12]}"

    return damage


def header_length(name: str) -> Damage:
    def damage(folder: Path, draw: random.Random) -> str:
        raw = bytearray((folder / name).read_bytes())
        length = draw.choice([0, 1, 7, len(raw), 2**31, 2**63, 2**64 - 1, draw.randrange(2**40)])
        raw[:8] = struct.pack("<Q", length)
        (folder / name).write_bytes(raw)
        return f"{name} claims a header of {length} bytes"

    return damage


def header_noise(name: str) -> Damage:
    def damage(folder: Path, draw: random.Random) -> str:
        header, data = read_shard(folder / name)
        text = bytearray(json.dumps(header).encode())
        place = draw.randrange(len(text) // 2)
        text[place : place + 4] = draw.choice([b"\xff\xfe\x00\x01", b"}}}}", b"    ", b'""""'])
        write_shard(folder / name, bytes(text), data)
        return f"{name}: header bytes at {place} overwritten"

    return damage


@of_header
def header_entry(header: dict, draw: random.Random) -> str:
    tensor = draw.choice(names(header))
    entry = header[tensor]
    begin, end = entry["data_offsets"]
    change = draw.choice([
        {"data_offsets": [end, begin]},
        {"data_offsets": [begin, end + 8]},
        {"data_offsets": [begin, 2**62]},
        {"data_offsets": [-8, end]},
        {"data_offsets": [begin]},
        {"data_offsets": "all"},
        {"shape": [2**40, 2**40]},
        {"shape": [-1, 4]},
        {"shape": "big"},
        {"shape": [10**400]},
        {"shape": entry["shape"] + [2]},
        {"shape": [1.0, 2.0]},
        {"shape": None},
        {"dtype": "BF16"},
        {"dtype": "F64"},
        {"dtype": "Q4_K"},
        {"dtype": 7},
        {"dtype": ["F32"]},
    ])  # fmt: skip
    header[tensor] = {**entry, **change}
    return f"{tensor} becomes {str(change)[:60]}"


@of_header
def header_entry_is(header: dict, draw: random.Random) -> str:
    tensor = draw.choice(names(header))
    header[tensor] = draw.choice([None, 3, "text", [], {}, {"dtype": "F32"}])
    return f"{tensor} is {header[tensor]!r}"


@of_header
def overlapping(header: dict, draw: random.Random) -> str:
    first, second = draw.sample(names(header), 2)
    header[first] = dict(header[second])
    return f"{first} lies where {second} lies"


@of_header
def swapped(header: dict, draw: random.Random) -> str:
    """Two tensors of different shapes change places."""
    pairs = [
        (a, b)
        for a in names(header)
        for b in names(header)
        if header[a]["shape"] != header[b]["shape"]
    ]
    a, b = draw.choice(pairs)
    header[a], header[b] = header[b], header[a]
    return f"{a} and {b} swapped"


@of_header
def renamed(header: dict, draw: random.Random) -> str:
    tensor = draw.choice(names(header))
    new = draw.choice(["x", "", f"{tensor}.x", "../../etc/passwd", "model.layers.99.z", "é\u0000"])
    header[new] = header.pop(tensor)
    return f"{tensor} renamed {new!r}"


def not_finite(name: str) -> Damage:
    def damage(folder: Path, draw: random.Random) -> str:
        header, data = read_shard(folder / name)
        tensor = draw.choice(names(header))
        begin, end = header[tensor]["data_offsets"]
        value = draw.choice([float("nan"), float("inf"), float("-inf")])
        filled = struct.pack("<f", value) * ((end - begin) // 4)
        write_shard(folder / name, header, data[:begin] + filled + data[end:])
        return f"{name}: {tensor} all {value}"

    return damage


def config_width(folder: Path, draw: random.Random) -> str:
    key, value = draw.choice(WIDTHS), draw.choice(BAD_NUMBERS)
    if (key, value) == ("head_dim", None):
        value = -1  # absent is a value that configs may have
    if value is None and key == "num_key_value_heads":
        value = "4"
    if value is True:
        value = [True]
    edit(folder / CONFIG, **{key: value})
    return f"config {key} = {value!r}"


def config_key_gone(folder: Path, draw: random.Random) -> str:
    config = json.loads((folder / CONFIG).read_text())
    optional = ("head_dim", "num_key_value_heads")
    key = draw.choice([k for k in WIDTHS if k not in optional] + ["model_type"])
    del config[key]
    (folder / CONFIG).write_text(json.dumps(config))
    return f"config without {key}"


def config_model_type(folder: Path, draw: random.Random) -> str:
    value = draw.choice(["gpt9", "", None, 7, ["llama"], {"a": 1}, "x" * 10_000])
    edit(folder / CONFIG, model_type=value)
    return f"config model_type = {str(value)[:20]}"


def config_layers(folder: Path, draw: random.Random) -> str:
    value = draw.choice([
        {"1": {"intermediate_size": 4}}, {"x": 1}, "wide", [1], {"1": 3}, {"99": {}},
        {"1": {"intermediate_size": "no"}}, 5, {"-1": {"num_attention_heads": 1}},
    ])  # fmt: skip
    edit(folder / CONFIG, per_layer_config=value)
    return f"config per_layer_config = {value}"


def config_huge_digits(folder: Path, draw: random.Random) -> str:
    text = (folder / CONFIG).read_text()
    number = draw.choice(["9" * 5000, "1e999", "-" + "9" * 400, "1" + "0" * 100])
    key = draw.choice(["hidden_size", "vocab_size", "num_hidden_layers"])
    config = json.loads(text)
    (folder / CONFIG).write_text(text.replace(f'"{key}": {config[key]}', f'"{key}": {number}'))
    return f"config {key} = {number[:12]}..."


def index_of(folder: Path, draw: random.Random) -> str:
    header, _ = read_shard(folder / WEIGHTS)
    weight_map: object = dict.fromkeys(names(header), WEIGHTS)
    tensor = draw.choice(names(header))
    place = draw.choice([
        "gone.safetensors", "../outside/secret.safetensors", "/etc/passwd", "", ".", "..",
        7, None, ["a"], "a/b.safetensors", "x\u0000y", "a" * 5000,
    ])  # fmt: skip
    weight_map[tensor] = place
    whole = draw.choice([{"weight_map": weight_map}] * 5 + [{}, {"weight_map": []}])
    (folder / INDEX).write_text(json.dumps(whole))
    return f"index: {tensor} in {str(place)[:40]!r}, keys {list(whole)}"


def shard_is_link(name: str) -> Damage:
    def damage(folder: Path, draw: random.Random) -> str:
        target = draw.choice(["/etc/passwd", "/dev/null", "gone", name, ".", "/proc/self/mem"])
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        return f"{name} is a link to {target}"

    return damage


def adapter_config(folder: Path, draw: random.Random) -> str:
    change = draw.choice([
        {"peft_type": "IA3"}, {"peft_type": None}, {"use_dora": True}, {"r": 4}, {"r": 0},
        {"r": "eight"}, {"r": None}, {"r": 10**30}, {"peft_type": ["LORA"]}, {"r": [8]},
    ])  # fmt: skip
    edit(folder / ADAPTER_CONFIG, **change)
    return f"adapter config {change}"


def adapter_factor(folder: Path, draw: random.Random) -> str:
    """A factor of another rank, another width, or gone."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / ADAPTER)
    name = draw.choice(sorted(tensors))
    rows, columns = tensors[name].shape
    what = draw.choice(["rank", "rows", "gone", "flat", "integer", "stranger"])
    if what == "gone":
        del tensors[name]
    elif what == "flat":
        tensors[name] = tensors[name].reshape(-1).clone()
    elif what == "integer":
        tensors[name] = torch.ones(rows, columns, dtype=torch.int64)
    elif what == "stranger":
        tensors["base_model.model.model.layers.99.mlp.up_proj.lora_A.weight"] = torch.ones(8, 32)
        tensors["base_model.model.model.layers.99.mlp.up_proj.lora_B.weight"] = torch.ones(40, 8)
    else:
        inner = ("lora_A" in name) == (what == "rank")
        shape = (rows + 1, columns) if inner else (rows, columns + 1)
        tensors[name] = torch.ones(shape)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    return f"adapter {name}: {what}"


def manifest_by_hand(*, sealed: bool) -> Damage:
    """A record edited by hand: with its digest left as it was, or taken out."""

    def damage(folder: Path, draw: random.Random) -> str:
        file = folder / "loram.json"
        data = json.loads(file.read_text())
        if not sealed:
            data.pop("digest")
        layer = sorted(data["keep"])[0]
        kept = data["keep"][layer]
        changes: list[dict] = [
            {"stage": "prune"},
            {"stage": None},
            {"schema_version": 2},
            {"schema_version": "1"},
            {"base": {**data["base"], "weights": "sha256:00"}},
            {"base": {}},
            {"keep": {layer: {**kept, "intermediate": [*kept["intermediate"][:-1], 10**6]}}},
            {"keep": {layer: {**kept, "intermediate": kept["intermediate"][1:]}}},
            {"keep": {layer: {**kept, "intermediate": [-1, *kept["intermediate"][1:]]}}},
            {"keep": {layer: {**kept, "intermediate": [kept["intermediate"][0]] * 20}}},
            {"keep": {layer: {"intermediate": kept["intermediate"]}}},
            {"keep": {"x": kept}},
            {"keep": [1]},
            {"keep": {layer: 3}},
            {"keep": {layer: {**kept, "key_value_heads": ["a", "b"]}}},
            {"inputs": 3},
            {"base": "here"},
            {"surprise": 1},
        ]
        change = draw.choice(changes)
        file.write_text(json.dumps({**data, **change}))
        return f"manifest {'as sealed' if sealed else 'unsealed'}: {str(change)[:90]}"

    return damage


def data_lines(folder: Path, draw: random.Random) -> str:
    good = json.dumps({"prompt": "a", "completion": "b"})
    bad = draw.choice([
        b"{", b"[]", b"3", b"null", b'{"completion": "b"}', b'{"x": 1}', b"[" * 100_000,
        b'{"prompt": "a\xff", "completion": "b"}', b"\x00\x01\x02",
    ])  # fmt: skip
    lines = [good.encode()] * 4
    lines.insert(draw.randrange(5), bad)
    (folder / "data.jsonl").write_bytes(b"\n".join(lines))
    return f"data line {bad[:40]!r}"


def data_whole(folder: Path, draw: random.Random) -> str:
    raw = draw.choice([b"", b"\n\n", b"\xff" * 100, b"\x89PNG\r\n", b"PAR1", b'{"prompt": "a"}'])
    (folder / "data.jsonl").write_bytes(raw)
    return f"data {raw[:20]!r}"


def recipe(folder: Path, draw: random.Random) -> str:
    text = draw.choice([
        b"", b"\xff\xfe", b"- a", b"model: [", b"a: &a [*a]", b"model: demo\nprune: 3",
        b"model: demo\nprune: {ratio: .nan}", b"model: demo\nprune: {ratio: 1e999}",
        b"model: demo\nprune: {keep_first: 99999999999999999999}", b"model: 3\nprune: {}",
        b"model: demo\nprune: {ratio: [0.5]}", b"model: demo\nsteps: 3", b"[" * 5000,
        b"model: demo\nprune: {seed: 1.5}", b"!!python/object/apply:os.system ['true']",
        b"model: demo\nprune: {ratio: 0.5, ratio: high}", b"1: 2\nmodel: demo",
        b"model: demo\ntrain: {batch: 3, micro_batch: 2}", b"model: demo\ntrain: {dropout: 2}",
        b"model: demo\nprune: {1: 2}", b"model: demo\neval: {tasks: {a: 1}}",
    ])  # fmt: skip
    (folder / "recipe.yaml").write_bytes(text)
    return f"recipe {text[:50]!r}"


def state(folder: Path, draw: random.Random) -> str:
    text = draw.choice([b"", b"{", b"[]", b'{"model": "/gone/model"}', b"\xff", b"3", b"null"])
    (folder / "run.json").write_bytes(text)
    return f"run.json {text!r}"


def other_tokenizer(folder: Path, draw: random.Random) -> str:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"]["Z"] = 300
    file.write_text(json.dumps(data))
    return "another tokenizer"


MODEL_FILES = (CONFIG, WEIGHTS, "tokenizer.json")
# What the command works on: the base (prune, recover), the adapter (recover), data, recipe, run.
DAMAGES: list[tuple[str, Damage]] = [
    ("base", truncated(WEIGHTS)),
    ("base", header_length(WEIGHTS)),
    ("base", header_noise(WEIGHTS)),
    ("base", header_entry(WEIGHTS)),
    ("base", header_entry_is(WEIGHTS)),
    ("base", overlapping(WEIGHTS)),
    ("base", swapped(WEIGHTS)),
    ("base", renamed(WEIGHTS)),
    ("base", not_finite(WEIGHTS)),
    ("base", config_width),
    ("base", config_width),
    ("base", config_key_gone),
    ("base", config_model_type),
    ("base", config_layers),
    ("base", config_huge_digits),
    ("base", index_of),
    ("base", index_of),
    ("base", shard_is_link(WEIGHTS)),
    ("base", empty(CONFIG, WEIGHTS)),
    ("base", gone(CONFIG, WEIGHTS, "tokenizer.json")),
    ("base", not_utf8(CONFIG)),
    ("base", not_json(CONFIG)),
    ("adapter", truncated(ADAPTER)),
    ("adapter", header_length(ADAPTER)),
    ("adapter", header_entry(ADAPTER)),
    ("adapter", not_finite(ADAPTER)),
    ("adapter", adapter_config),
    ("adapter", adapter_factor),
    ("adapter", adapter_factor),
    ("adapter", manifest_by_hand(sealed=True)),
    ("adapter", manifest_by_hand(sealed=False)),
    ("adapter", manifest_by_hand(sealed=False)),
    ("adapter", empty(ADAPTER, ADAPTER_CONFIG, "loram.json")),
    ("adapter", gone(ADAPTER, ADAPTER_CONFIG, "loram.json")),
    ("adapter", not_json(ADAPTER_CONFIG, "loram.json")),
    ("adapter", not_utf8(ADAPTER_CONFIG, "loram.json")),
    ("adapter", shard_is_link(ADAPTER)),
    ("recovering base", not_finite(WEIGHTS)),
    ("recovering base", other_tokenizer),
    ("data", data_lines),
    ("data", data_lines),
    ("data", data_whole),
    ("recipe", recipe),
    ("recipe", recipe),
    ("state", state),
]
