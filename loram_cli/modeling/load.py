"""A Hugging Face model whose decoder layers differ in width.

transformers reads ``per_layer_config`` but its modelling classes still build every layer from the
global widths. The subclass made here builds each layer from its own entry, and nothing else: the
config keeps the family's ``model_type``, so that the directory loads without this door once the
modelling half of transformers lands.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from loram_cli.arch.spec import ATTENTION_AXES, LOW_RANK, Family, LayerGeometry
from loram_cli.arch.wrappers import text_view, wrapper_of
from loram_cli.checkpoint.finite import check_finite
from loram_cli.checkpoint.header import TensorEntry
from loram_cli.checkpoint.index import read_json
from loram_cli.checkpoint.low_bit import PackedEntry
from loram_cli.checkpoint.model import Model
from loram_cli.checkpoint.mxfp4 import Mxfp4Entry, takes_mxfp4
from loram_cli.checkpoint.reader import TensorReader
from loram_cli.errors import LoramError, UsageError, is_out_of_memory
from loram_cli.modeling.low_rank import set_low_rank
from loram_cli.quiet import no_progress_bars, quiet_libraries, quiet_panics
from loram_cli.reporting import Reporter

# Kinds of layer, and the config's key of how many tokens they see.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# There while NVIDIA's driver is loaded, whichever torch is installed.
_NVIDIA = Path("/proc/driver/nvidia/version")


def warn_of_unused_gpu(device: str | None, reporter: Reporter) -> None:
    """Say so where a GPU stays idle; see :func:`unused_gpu`."""
    reason = unused_gpu(device)
    if reason is not None:
        reporter.warn(
            f"using the CPU: torch cannot use this machine's NVIDIA GPU ({reason}); "
            "install a torch that fits its driver, or pass --device cpu"
        )


@contextmanager
def loading(file: Path, library: str = "transformers", hint: str | None = None) -> Iterator[None]:
    """Blame a user's file for whatever a library raises while it reads it.

    Each class of transformers, tokenizers and PEFT has its own way to refuse a value: by any
    exception, by endless recursion, or by a panic of Rust, which is no ``Exception``.

    Args:
        file: The file, or the directory where it may be any of several.
        library: Who reads it.
        hint: What to do about it.

    Raises:
        LoramError: Something else than one was raised, or no end of memory.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        known = isinstance(error, LoramError) or is_out_of_memory(error)
        if known or not (panic or isinstance(error, Exception)):
            raise
        reason = " ".join(str(error).split())[:160] or "no reason given"
        raise LoramError(
            f"{file}: {library} cannot use it ({type(error).__name__}: {reason})", hint
        ) from error


@cache
def narrow_class(family: Family) -> type[Any]:
    """The family's causal LM class, with layer ``i`` built from ``config.per_layer_config[i]``.

    Its attribute ``family`` is the family.
    """
    import transformers

    parent = getattr(transformers, family.architecture)

    def __init__(self: Any, config: Any) -> None:
        parent.__init__(self, config)
        if config.is_heterogeneous:
            layers = self.get_submodule(family.layers)
            plain = config.to_dict()
            for i, widths in enumerate(family.geometry(plain).layers):
                if family.attributes is None:
                    # Layers of different kinds may be of different classes.
                    layers[i] = type(layers[i])(config.per_layer_config[i], i)
                _cut_to_size(layers[i], family, widths, plain)
            self.post_init()
        if getattr(config, LOW_RANK, None):
            set_low_rank(self, family, config.to_dict())
            self.post_init()

    # In its parent's module: transformers renames a published file's tensors only for its own.
    members = {"__init__": __init__, "__module__": parent.__module__, "family": family}
    return type(family.architecture, (parent,), members)


def _cut_to_size(
    layer: Any, family: Family, widths: LayerGeometry, config: Mapping[str, Any]
) -> None:
    """Linears and attributes of a layer whose class does not take all of its widths.

    Args:
        layer: The layer's module; changed in place.
        family: Tells the shapes, and which attributes hold widths.
        widths: What the layer is to have.
        config: The parsed ``config.json``.
    """
    for path, width in (family.attributes or {}).items():
        owner, _, name = path.rpartition(".")
        value = widths.axis_units(width) if width in ATTENTION_AXES else getattr(widths, width)
        setattr(layer.get_submodule(owner), name, value)
    shapes = family.layer_shapes(0, widths, config)
    for module in family.layer_modules(widths):
        rows, columns = shapes[f"{family.layer_prefix(0)}{module.name}.weight"]
        linear = layer.get_submodule(module.name)
        if (linear.out_features, linear.in_features) != (rows, columns):
            # Of the same class: some families have a linear of their own.
            cut = type(linear)(columns, rows, bias=linear.bias is not None)
            owner, _, name = module.name.rpartition(".")
            setattr(layer.get_submodule(owner), name, cut.to(linear.weight.dtype))
    for tensor in family.layer_norms:
        # Of norms over heads, where the class takes their width from elsewhere.
        shape = shapes.get(f"{family.layer_prefix(0)}{tensor.name}")
        owner, _, name = tensor.name.rpartition(".")
        if shape is not None and (old := layer.get_parameter(tensor.name)).shape != shape:
            layer.get_submodule(owner)._parameters[name] = torch.nn.Parameter(old.new_ones(shape))


def load_causal_lm(
    model: Path | Model,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = None,
    attention: str | None = None,
) -> Any:
    """Load a base, pruned, aligned or merged directory as a Hugging Face causal LM.

    Args:
        model: A model, or its directory with ``config.json`` and safetensors; widths may differ
            per layer. Weights of few bits become floating ones;
            :class:`.skeleton.SkeletonModel` keeps them. So do experts in MXFP4.
        dtype: Parameter type; ``auto`` takes the checkpoint's own.
        device: ``cpu``, ``cuda``, ...; None takes a GPU when there is one.
        attention: ``sdpa``, ``flash`` or ``eager``; None and ``auto`` leave it to transformers.

    Returns:
        The model in evaluation mode.

    Raises:
        LoramError: Unknown family, or weights that do not fit the config.
        UsageError: There is no such device.
    """
    source = Model.of(model)
    directory, family = source.directory, source.family
    config = load_config(directory)
    generation = load_generation_config(directory)
    kwargs: dict[str, Any] = {}
    if source.wrapper is not None:
        kwargs["key_mapping"] = source.wrapper.renames
    if attention not in (None, "auto"):
        kwargs["attn_implementation"] = attention_kernel(attention)
    place = usable_device(device)
    stored: Path | None = directory
    entries = source.index.tensors
    reader = TensorReader(source.index, once=True)
    if any(map(_is_read_here, entries.values())):
        stored = None
        kwargs["state_dict"] = {name: _Stored(reader, name) for name in entries}
        if dtype == "auto":
            dtype = config.dtype or source.dtype.to_torch()
    with reader, loading(directory), quiet_libraries(), no_progress_bars():
        loaded, report = narrow_class(family).from_pretrained(
            stored,
            config=config,
            dtype=dtype,
            device_map={"": place},
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
    if generation is not None:
        loaded.generation_config = generation
    problems = [name for key in ("missing_keys", "mismatched_keys") for name in report[key]]
    unexpected = [name for name in report["unexpected_keys"] if not family.is_ignored(name)]
    if source.wrapper is not None:
        # The vision tower and the like, whose names are checked by the index.
        unexpected = []
    if problems or unexpected:
        first = (problems + unexpected)[0]
        raise LoramError(
            f"{directory}: tensor {first} does not fit config.json "
            f"({len(problems)} missing or misshapen, {len(unexpected)} unexpected)"
        )
    for name, tensor in chain(loaded.named_parameters(), loaded.named_buffers()):
        if name in entries:
            check_finite(entries[name].file, entries[name].name, tensor.detach())
    loaded.wrapper = source.wrapper
    return loaded.eval()


def _is_read_here(entry: TensorEntry) -> bool:
    """Whether transformers cannot read a tensor as it is stored."""
    return isinstance(entry, PackedEntry | Mxfp4Entry)


class _Stored:
    """A tensor that is read when transformers asks for it, as it does of a file of its own."""

    def __init__(self, reader: TensorReader, name: str) -> None:
        self._reader, self._name = reader, name

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self._reader.read(self._name)[key]


def load_config(directory: Path) -> Any:
    """The directory's transformers config; global widths stay readable where layers differ.

    Of a multimodal model it is the text model's.

    Raises:
        LoramError: It cannot be used; names the file.
    """
    import transformers

    with loading(directory / "config.json"), quiet_libraries():
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        stated = read_json(directory / "config.json")
        if takes_mxfp4(stated):
            # Our own reader gives floating numbers.
            del config.quantization_config
        if wrapper_of(stated) is not None:
            config, view = config.get_text_config(), text_view(stated)
            for key in ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id"):
                setattr(config, key, view.get(key, getattr(config, key)))
        # The base class's __init__ needs the global widths before layers are replaced.
        config.allow_global_per_layer_attribute_access = True
        settle_calls(config, str(directory / "config.json"))
    return config


def settle_calls(config: Any, where: str) -> None:
    """Have a model answer as it is asked here, whatever its config says of what it returns.

    Args:
        config: A transformers config; changed in place.
        where: Its file, for the error.

    Raises:
        LoramError: Its layers are of a kind whose width in tokens it does not state.
    """
    config.return_dict = True
    config.output_attentions = config.output_hidden_states = False
    kinds = getattr(config, "layer_types", None) or ()
    for kind, key in _WINDOWS.items():
        if kind in kinds and getattr(config, key, None) is None:
            raise LoramError(f"{where}: layer_types has {kind}, and {key} is absent")


def load_generation_config(directory: Path) -> Any | None:
    """The directory's generation config, the only file that may name the tokens that end an answer.

    Returns:
        None where there is none.

    Raises:
        LoramError: It cannot be used, which ``from_pretrained`` passes over; names the file.
    """
    import transformers

    file = directory / "generation_config.json"
    if not file.is_file():
        return None
    with loading(file), quiet_libraries():
        found = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    ends = found.eos_token_id
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and type(end) is not int:
            raise LoramError(f"{file}: eos_token_id is {str(ends)[:40]}, expected whole numbers")
    return found


def attention_kernel(name: str) -> str:
    """Transformers' name of an attention kernel.

    Raises:
        LoramError: The kernel's package is absent.
    """
    if name != "flash":
        return name
    if importlib.util.find_spec("flash_attn") is None:
        raise LoramError(
            "--attention flash: the package flash-attn is not installed",
            "pip install flash-attn, or pass --attention sdpa, which needs as little memory",
        )
    return "flash_attention_2"


def load_tokenizer(model_dir: Path) -> Any:
    """Load the directory's tokenizer, with a pad token set (eos where there is none).

    Raises:
        LoramError: The directory has no tokenizer that transformers can read.
    """
    hint = "the directory needs tokenizer.json (or tokenizer.model) and tokenizer_config.json"
    with quiet_libraries(), no_progress_bars(), quiet_panics():
        try:
            with loading(model_dir, hint=hint):
                tokenizer = _tokenizer(model_dir)
        except LoramError:
            with loading(_damaged(model_dir), hint=hint):
                tokenizer = _tokenizer(model_dir)
    return tokenizer


def _tokenizer(model_dir: Path) -> Any:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A damaged normalizer or template shows here, and not amid a stage.
    tokenizer("a", verbose=False)
    return tokenizer


def _damaged(model_dir: Path) -> Path:
    """The file that a tokenizer cannot be read from; the directory where it may be any."""
    import transformers

    whole, config = model_dir / "tokenizer.json", model_dir / "tokenizer_config.json"
    for file in (config, whole):
        if file.is_file():
            try:
                read_json(file)
            except LoramError:
                return file
    if not whole.is_file():
        return model_dir
    try:
        with loading(whole, "tokenizers"):
            transformers.PreTrainedTokenizerFast(tokenizer_file=str(whole))("a")
    except LoramError:
        return whole
    return config if config.is_file() else model_dir


def default_device() -> str:
    """``cuda`` when a GPU is usable, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def slow_in_bf16(device: str) -> bool:
    """Whether a device computes bf16 far slower than fp32: a CPU without instructions for it.

    oneDNN leaves such products to plain loops: of AVX2's, a layer's forward pass takes 6 times as
    long as in fp32, and its backward pass 40 times.
    """
    return device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def unused_gpu(device: str | None) -> str | None:
    """Why a machine's NVIDIA GPU stays idle though no device was asked for; None where none does.

    Torch falls back to the CPU without an error, and a training takes a hundred times as long.
    """
    if device is not None or torch.cuda.is_available() or not _NVIDIA.exists():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition(". ")[0] or "no reason given"
    return "torch finds no device"


def usable_device(device: str | None) -> str:
    """The device asked for, or the default one.

    Raises:
        UsageError: Torch knows no such device, or this machine has no such GPU.
    """
    if device is None:
        return default_device()
    expected = "pass cpu, cuda or cuda:1"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device}: unknown", expected) from error
    if wanted.type == "mps" and torch.backends.mps.is_available():
        return device
    if wanted.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: not usable here", expected)
    if wanted.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (wanted.index or 0) >= found:
            raise UsageError(
                f"--device {device}: no such GPU; torch finds {found} here",
                "pass --device cpu" if found == 0 else "start one process for each GPU",
            )
    return device
