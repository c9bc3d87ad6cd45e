"""A run as one HTML page that needs nothing else: scores, answers, curves, memory, data, specs."""

from collections.abc import Iterator, Mapping
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from loram_cli.errors import LoramError, UsageError
from loram_cli.evaluation.comparison import score_text
from loram_cli.evaluation.requests import TaskScore
from loram_cli.evaluation.results import EvalResult
from loram_cli.runs.manifest import Manifest
from loram_cli.runs.output_file import whole_file
from loram_cli.runs.rundir import OUTPUTS
from loram_cli.runs.staging import followed
from loram_cli.stages.core.results import PruneResult, TrainResult, result_of
from loram_cli.stages.evaluate.results import read_results
from loram_cli.tools import page_parts
from loram_cli.tools.inspect import Inspection, inspect
from loram_cli.units import format_bytes, format_params, format_seconds

PAGE_NAME = "report.html"
_BEGINNING = b"<!doctype html>"


def write_page(run: Path, out: Path) -> None:
    """Write the page of a run directory.

    Raises:
        LoramError: No stage of it is finished, or the file cannot be written.
        UsageError: The file is there already, and is no page.
    """
    out = followed(out)
    if out.is_dir():
        raise UsageError(f"{out}: is a folder, expected a file", "pass another --out")
    page = render_page(run)
    _refuse_other(out)
    # An earlier page stays until the new one is whole.
    with whole_file(out, replace=True) as file:
        file.write(page.encode())


def _refuse_other(out: Path) -> None:
    """Refuse to replace a file that is no page."""
    if not out.is_file() or not out.stat().st_size:
        return
    with out.open("rb") as file:
        if file.read(len(_BEGINNING)).lower() != _BEGINNING:
            raise UsageError(f"{out}: exists and is no HTML page", "pass another --out")


def render_page(run: Path) -> str:
    """The page of a run directory, from the records of its stages.

    Raises:
        LoramError: It is no run directory, or no stage of it is finished.
    """
    found = inspect(run)
    if found.kind != "run" or not found.outputs:
        raise LoramError(f"{run}: no stage of a run is finished here")
    manifests = {output.directory.name: Manifest.read(output.directory) for output in found.outputs}
    first = next(iter(manifests.values()))
    versions = " ".join(f"{name} {v}" for name, v in first.versions.items() if v != "absent")
    body = [
        *_tiles(manifests),
        *_scores(run, manifests),
        *_answers(run, manifests),
        *_curves(found.outputs),
        *_memory(run, manifests),
        *_data(found.outputs, manifests),
        *_layers(found.outputs),
        *_records(manifests),
    ]
    base = Path(str(found.base or "")).name or "a base model"
    template = Template((resources.files("loram_cli.tools") / "page.html").read_text("utf-8"))
    return template.substitute(
        title=escape(f"LoRAM run of {base}"), subtitle=escape(versions), body="\n".join(body)
    )


def _by_stage(manifests: Mapping[str, Manifest], stage: str) -> Manifest | None:
    return next((m for m in manifests.values() if m.stage == stage), None)


def _tiles(manifests: Mapping[str, Manifest]) -> Iterator[str]:
    tiles: list[tuple[str, str]] = []
    results = {m.stage: (result_of(m), m) for m in reversed(list(manifests.values()))}
    for result, manifest in (results[name] for name in ("prune", "train") if name in results):
        if isinstance(result, PruneResult):
            arrow = f"{format_params(result.base_params)} → {format_params(result.pruned_params)}"
            tiles.append((arrow, f"parameters, {result.reduction:.2f}x smaller"))
        if isinstance(result, TrainResult):
            tiles.append((format_params(result.lora_params), "LoRA parameters trained"))
            memory = format_bytes(manifest.peak_memory_increase_bytes)
            tiles.append((memory, "peak memory of training, above the start"))
            tiles.append((format_seconds(manifest.wall_seconds), "time of training"))
    if tiles:
        cells = (
            f'<div class="tile"><b>{escape(figure)}</b><span>{escape(said)}</span></div>'
            for figure, said in tiles
        )
        yield f'<div class="tiles">{"".join(cells)}</div>'


def _scores(run: Path, manifests: Mapping[str, Manifest]) -> Iterator[str]:
    if _by_stage(manifests, "eval") is None:
        return
    # The manifest is written with sorted keys; the results keep the order of the comparison.
    found = read_results(run / OUTPUTS["eval"])
    if not found.rows:
        return
    columns = list(dict.fromkeys((score.task, score.metric) for score in found.scores()))
    yield "<h2>Held-out results</h2>"
    heads = "".join(
        f"<th>{escape(task)}{'' if task == metric else f'<br>{escape(metric)}'}</th>"
        for task, metric in columns
    )
    yield (
        '<div class="scroll"><table><tr><th>model</th><th>trained on</th><th>training memory</th>'
        f"<th>training time</th>{heads}</tr>"
    )
    best = {key: _best([row.find(*key) for row in found.rows.values()]) for key in columns}
    for label, row in found.rows.items():
        cost = row.training
        cells = [
            format_params(cost.trained_on_params or 0) if cost else "-",
            format_bytes(cost.peak_memory_increase_bytes) if cost else "-",
            format_seconds(cost.wall_seconds) if cost else "-",
        ]
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        for key in columns:
            score = row.find(*key)
            value = score.value if score else None
            mark = ' class="best"' if value is not None and value == best[key] else ""
            line += f"<td{mark}>{escape(score_text(score))}</td>"
        yield f"<tr><td>{escape(label)}</td>{line}</tr>"
    yield "</table></div>"
    yield from _score_notes(found)


def _score_notes(found: EvalResult) -> Iterator[str]:
    yield '<p class="note">±: 95% confidence; shares in percent.</p>'
    if found.bundled:
        yield '<p class="note">Bundled sample, not the published benchmark.</p>'
    if found.quantize:
        yield '<p class="note">Every row was run with its weights in NF4.</p>'


def _best(column: list[TaskScore | None]) -> float | None:
    told = [score for score in column if score and score.value is not None]
    if len(told) < 2:
        return None
    values = [score.value for score in told if score.value is not None]
    return max(values) if told[0].higher_is_better else min(values)


def _answers(run: Path, manifests: Mapping[str, Manifest]) -> Iterator[str]:
    if _by_stage(manifests, "eval") is not None:
        yield from page_parts.answers(run / OUTPUTS["eval"])


def _memory(run: Path, manifests: Mapping[str, Manifest]) -> Iterator[str]:
    bases = (str(m.base.get("path") or "") for m in manifests.values())
    base = next(filter(None, map(page_parts.base_at_hand, bases)), None)
    yield from page_parts.memory(manifests, run, base)


def _data(outputs: tuple[Inspection, ...], manifests: Mapping[str, Manifest]) -> Iterator[str]:
    trained = _by_stage(manifests, "train")
    if trained is None:
        return
    # The pruned model has the base's tokenizer, and lies in the run.
    pruned = next((o.directory for o in outputs if o.stage == "prune"), None)
    if pruned is not None:
        yield from page_parts.data_lengths(trained, pruned)


def _curves(outputs: tuple[Inspection, ...]) -> Iterator[str]:
    curves = [o.directory for o in outputs if (o.directory / "loss.csv").is_file()]
    if not curves:
        return
    from loram_cli.training.curves import curve_svg, read_curve_csv

    yield '<h2>Loss curves</h2><div class="curves">'
    for directory in curves:
        yield curve_svg(read_curve_csv(directory / "loss.csv"), directory.name, directory.name)
    yield "</div>"


def _layers(outputs: tuple[Inspection, ...]) -> Iterator[str]:
    pruned = next((o for o in outputs if o.stage == "prune" and o.layers), None)
    if pruned is None:
        return
    yield '<h2>Widths of the pruned model</h2><div class="layers">'
    for layer in pruned.layers:
        heads = f"{layer.num_attention_heads}/{layer.num_key_value_heads} heads"
        yield (
            f"<span>layer {layer.layer}</span>"
            f'<i><b style="width:{layer.kept_share:.1%}"></b></i>'
            f"<span>{layer.kept_share:.0%} · {heads} · {layer.intermediate_size} channels</span>"
        )
    yield "</div>"


def _records(manifests: Mapping[str, Manifest]) -> Iterator[str]:
    yield "<h2>How each stage was run</h2>"
    for name, manifest in manifests.items():
        took = format_seconds(manifest.wall_seconds)
        memory = format_bytes(manifest.peak_memory_bytes)
        rows = {**manifest.spec, "key": manifest.key, "peak memory": memory}
        cells = "".join(
            f"<tr><td>{escape(key)}</td><td>{escape(_plain(value))}</td></tr>"
            for key, value in rows.items()
            if value not in (None, "", [], {}, False)
        )
        head = escape(f"{name}: {manifest.stage}, {took}")
        yield f"<details><summary>{head}</summary><table>{cells}</table></details>"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | dict) else str(value)
