from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from disagg.reports.drawing import legend, styles_of
from disagg.reports.page import write_report
from disagg.reports.runs import ReportError
from disagg.reports.tables import number, signed_percent, to_csv
from tests.test_reports_runs import config_of, request, serve, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a simulated experiment and of one that ran in both worlds."""
    root = tmp_path_factory.mktemp("report")
    for policy in ("round_robin", "least_tokens"):
        tables = serve(policy, num_requests=60, rate=9.0)
        config = config_of(policy, 9.0, name="four <policies> & more")
        config["name"] = "four-policies"
        write_run(root / "runs" / "sim" / policy / "0", config, {"oracle": policy == "least_tokens"}, **tables)
        for backend in ("simulation", "hardware"):
            tables = serve(policy, num_requests=50, rate=9.0, speed=1.1 if backend == "hardware" else 1.0)
            config = config_of(policy, 9.0, backend, name="both-worlds")
            write_run(root / "runs" / backend / policy, config, {"configuration_hash": policy}, **tables)
    write_report([root / "runs"], root / "report.html")
    return root / "report.html"


def test_the_page_is_self_contained(report: Path) -> None:
    page = report.read_text()
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "Content-Security-Policy" in page


def test_the_page_has_a_section_per_experiment_and_every_part(report: Path) -> None:
    page = report.read_text()
    for text in (
        '<section id="1-both-worlds">',
        '<section id="2-four-policies">',
        "Policies in simulation",
        "Policies in runs on hardware",
        "Simulation beside hardware",
        "Executors over time",
        "Stage breakdown",
        "Same route",
        "n too small",
        "oracle: told true lengths",
        "time to first token everywhere",
    ):
        assert text in page


def test_figures_are_files_too_in_both_forms(report: Path) -> None:
    folder = report.with_name("report_files")
    drawn = {path.stem for path in folder.glob("*.png")}
    assert drawn == {path.stem for path in folder.glob("*.svg")}
    kinds = ("latency", "slo", "stages", "timeline-round-robin", "errors", "requests")
    for kind in kinds:
        assert any(stem.endswith(kind) for stem in drawn), kind
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


def test_tables_are_files_too(report: Path) -> None:
    folder = report.with_name("report_files")
    with (folder / "policies.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = next(row for row in rows if row["metric"] == "mean_ttft_s" and row["experiment"] == "four-policies")
    assert float(first["low_95"]) < float(first["value"]) < float(first["high_95"])
    with (folder / "simulation_errors.csv").open() as file:
        errors = {(row["policy"], row["metric"]): row for row in csv.DictReader(file)}
    assert float(errors["round_robin", "mean_tpot_s"]["relative_error"]) < -0.05
    with (folder / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6


def test_a_report_of_the_same_runs_is_the_same_page(report: Path, tmp_path: Path) -> None:
    write_report([report.parent / "runs"], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == report.read_bytes()


def test_names_from_a_configuration_are_escaped(tmp_path: Path) -> None:
    config = config_of("mine.py:<img src=x onerror=alert(1)>", name="<script>alert(2)</script>")
    write_run(tmp_path / "run", config, requests=[request()])
    write_report([tmp_path / "run"], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page


@pytest.mark.parametrize("finish_reason", ["stop", "error"])
def test_a_run_of_one_request_has_a_report(tmp_path: Path, finish_reason: str) -> None:
    row = request(finish_reason=finish_reason, error=None if finish_reason == "stop" else "no room")
    write_run(tmp_path / "run", config_of(slo=None), requests=[row])
    write_report([tmp_path / "run"], tmp_path / "out.html")
    assert "llama8b-2c2g" in (tmp_path / "out.html").read_text()


def test_a_run_without_requests_has_a_report_that_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    write_report([tmp_path / "run"], tmp_path / "out.html")
    assert "nothing was measured" in (tmp_path / "out.html").read_text()


def test_a_swept_rate_makes_curves_and_a_table_per_rate(tmp_path: Path) -> None:
    for rate in (2.0, 4.0):
        for repeat in range(2):
            tables = serve(num_requests=30, rate=rate, seed=repeat)
            config = config_of(rate=rate, seed=repeat)
            write_run(tmp_path / "runs" / f"rate={rate:g}" / str(repeat), config, {"repeat": repeat}, **tables)
    write_report([tmp_path / "runs"], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "Goodput and SLO attainment over rate" in page
    assert "<h4>rate=2</h4>" in page
    assert "in 2 repeats" in page


def test_a_policy_that_only_some_runs_have_is_told_as_none_of_the_others(tmp_path: Path) -> None:
    for roles in (None, {"name": "mixed_pool", "interval_s": 2.0}):
        config = config_of()
        config["policy"] |= {"roles": roles, "mixed_router": None}
        write_run(tmp_path / "runs" / str(bool(roles)), config, requests=[request()])
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "roles none | mixed_pool, interval_s 2" in page
    assert "mixed_router" not in page


def test_one_kind_of_warning_is_one_line_over_all_runs(tmp_path: Path) -> None:
    for policy, failures in (("round_robin", 1), ("random", 3)):
        rows = [request(i, finish_reason="error" if i < failures else "stop") for i in range(400)]
        write_run(tmp_path / "runs" / policy, config_of(policy), requests=rows)
    write_report([tmp_path / "runs"], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "1 to 3 of 400 requests did not complete (1 to 3 error)" in page
    assert "(all runs)" in page


def test_unequal_configurations_get_no_errors(tmp_path: Path) -> None:
    for backend in ("simulation", "hardware"):
        config = config_of(backend=backend)
        write_run(tmp_path / "runs" / backend, config, {"configuration_hash": backend}, requests=[request()])
    write_report([tmp_path / "runs"], tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "errors are shown only between equal configurations" in page
    assert not (tmp_path / "out_files" / "simulation_errors.csv").exists()


def test_a_truncated_run_leaves_no_report(tmp_path: Path) -> None:
    good = write_run(tmp_path / "runs" / "good", requests=[request()])
    bad = write_run(tmp_path / "runs" / "bad", requests=[request()])
    (bad / "steps.parquet").write_bytes((good / "steps.parquet").read_bytes()[:100])
    with pytest.raises(ReportError, match=r"bad/steps\.parquet"):
        write_report([tmp_path / "runs"], tmp_path / "out.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", requests=[request()])
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        write_report([tmp_path / "run"], tmp_path / "file" / "out.html")


def test_a_policy_keeps_its_colour_whatever_the_order() -> None:
    assert styles_of(["b", "a", "c"]) == styles_of(["c", "b", "a", "a"])
    assert len({style.colour for style in styles_of(list("abcdefg")).values()}) == 7


def test_a_legend_of_long_names_stays_inside_its_figure() -> None:
    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i in range(12):
        axes.plot([0, 1], [i, i], label=f"{i:02d} " + "wide name " * 4 + "x")
    legend(figure, axes)
    figure.draw_without_rendering()
    (drawn,) = figure.legends
    words = drawn.get_window_extent()
    assert words.width < figure.bbox.width
    assert axes.bbox.height > figure.dpi * 2.5


def test_numbers_carry_three_digits() -> None:
    assert [number(x) for x in (0.012345, 1.5, 834.2, 12345.6, 0.0, None)] == [
        "0.0123", "1.50", "834", "12,346", "0", "–",
    ]  # fmt: skip
    assert [signed_percent(x) for x in (0.012, -0.5, 0.0)] == ["+1.2 %", "−50 %", "0 %"]


def test_csv_text_is_never_a_formula() -> None:
    assert to_csv(["a"], [["=1+1"], [-1.5], [None]]) == 'a\n\'=1+1\n-1.5\n""\n'


def test_importing_the_metrics_table_loads_no_pandas_matplotlib_or_scipy() -> None:
    code = (
        "import sys, disagg.reports.metrics, disagg.reports.page\n"
        "bad = {'pandas', 'pyarrow', 'matplotlib', 'scipy', 'jinja2', 'torch', 'mpi4py', 'simpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(bad)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("size", ["1280,2400", "390,2400"])
def test_the_page_opens_in_a_browser(report: Path, tmp_path: Path, size: str) -> None:
    picture = tmp_path / "page.png"
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", f"--window-size={size}", f"--screenshot={picture}", report.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert picture.exists(), done.stderr
    assert "Refused to load" not in done.stderr
    from matplotlib.image import imread

    pixels = imread(picture)
    # a page with its first heading, tables and figures is neither blank nor one colour
    assert pixels[..., :3].std() > 0.05
