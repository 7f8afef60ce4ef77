"""A run directory as reports read it: configuration, manifest and tables, each loaded when first asked for.

Knows files only: nothing here may see a live cluster. Tables are those of `core/tables.py`, instants in float seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import yaml
from msgspec import Struct

from ..core.tables import DecisionRow, RequestRow, StayRow, StepRow, TransferRow

if TYPE_CHECKING:
    import pandas as pd

MANIFEST: Final = "manifest.json"
CONFIG: Final = "config.yaml"
TABLES: Final[dict[str, type[Struct]]] = {
    "requests": RequestRow,
    "steps": StepRow,
    "transfers": TransferRow,
    "decisions": DecisionRow,
    "stays": StayRow,
}


class ReportError(ValueError):
    """A run directory cannot be read. The message names the path and the cause."""


def columns_of(table: str) -> list[str]:
    """Column names of `table` as stored: the row's fields, `*_ps` written as `*_s`."""
    names = [field.name for field in msgspec.structs.fields(TABLES[table])]
    return [name.removesuffix("_ps") + "_s" if name.endswith("_ps") else name for name in names]


class Run:
    """One run directory. Raises ReportError naming the file where one is missing, truncated or malformed."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    # ---- configuration and manifest ---------------------------------------------------------------------------------

    @cached_property
    def config(self) -> dict[str, Any]:
        """The expanded experiment file."""
        path = self.path / CONFIG
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ReportError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ReportError(f"{path}: is not readable YAML: {error}") from error
        return _mapping(value, path)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """manifest.json, or an empty mapping while the run is still being written and has none."""
        path = self.path / MANIFEST
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ReportError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise ReportError(f"{path}: is not readable JSON (truncated?): {error}") from error
        return _mapping(value, path)

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.manifest.get("experiment") or self.manifest.get("name") or "unnamed")

    @property
    def backend(self) -> str:
        return str(self.manifest.get("backend") or self.config.get("backend") or "simulation")

    @property
    def seed(self) -> int | None:
        seed = self.manifest.get("seed", self.config.get("seed"))
        return int(seed) if isinstance(seed, int | str) and str(seed).lstrip("-").isdigit() else None

    @property
    def repeat(self) -> int:
        repeat = self.manifest.get("repeat")
        return repeat if isinstance(repeat, int) else 0

    @property
    def configuration_hash(self) -> str | None:
        value = self.manifest.get("configuration_hash")
        return str(value) if value else None

    @property
    def is_oracle(self) -> bool:
        """Whether a policy of this run was told true output lengths."""
        return bool(self.manifest.get("oracle") or self.manifest.get("is_oracle"))

    # ---- tables -----------------------------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> pd.DataFrame:
        return self._table("requests", required=True)

    @cached_property
    def steps(self) -> pd.DataFrame:
        return self._table("steps")

    @cached_property
    def transfers(self) -> pd.DataFrame:
        return self._table("transfers")

    @cached_property
    def stays(self) -> pd.DataFrame:
        return self._table("stays")

    @cached_property
    def decisions(self) -> pd.DataFrame:
        return self._table("decisions")

    def columns(self, table: str, names: Sequence[str]) -> pd.DataFrame:
        """Some columns of a table, not kept: of a long run the whole tables would fill the memory.

        Names that are no columns of `core/tables.py` are left out where the file has none such.
        """
        if table in self.__dict__:
            whole: pd.DataFrame = self.__dict__[table]
            return whole[[name for name in names if name in whole.columns]]
        return self._table(table, required=table == "requests", names=names)

    def _table(self, table: str, required: bool = False, names: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per record; an absent table that is not required is empty with the right columns."""
        import pandas as pd
        import pyarrow as pa

        path = self.path / f"{table}.parquet"
        known = [name for name in columns_of(table) if names is None or name in names]
        if not path.exists() and not required:
            return _typed(pd.DataFrame(columns=known), table)
        try:
            frame = pd.read_parquet(path, "pyarrow") if names is None else _one_by_one(path, names)
        except FileNotFoundError as error:
            raise ReportError(f"{path}: is missing: the directory is not a complete run") from error
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ReportError(f"{path}: is not a readable Parquet file (truncated?): {error}") from error
        for name, field in zip(columns_of(table), msgspec.structs.fields(TABLES[table])):
            if name in known and name not in frame.columns and not field.required:  # recorded before there was one
                frame[name] = field.default
        missing = [name for name in known if name not in frame.columns]
        if missing:
            raise ReportError(f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(map(str, frame))}")
        return _typed(frame, table)

    # ---- what the configuration says --------------------------------------------------------------------------------

    @cached_property
    def warmup_phases(self) -> frozenset[str]:
        """Names of the workload's phases that are left out of results."""
        workload = self.config.get("workload") or {}
        phases = workload.get("phases") or [] if isinstance(workload, dict) else []
        return frozenset(
            str(phase.get("name", ""))
            for phase in phases
            if isinstance(phase, dict) and phase.get("exclude_from_results")
        )

    @cached_property
    def objectives(self) -> dict[str, float]:
        """The service-level objectives of the configuration: keys `ttft_s`, `tpot_s`, `e2e_latency_s`, `attainment`."""
        slo = self.config.get("slo") or {}
        if not isinstance(slo, dict):
            raise ReportError(f"{self.path / CONFIG}: slo: is no mapping of objectives")
        found: dict[str, float] = {}
        for key, name in (("ttft_ms", "ttft_s"), ("tpot_ms", "tpot_s"), ("e2e_ms", "e2e_latency_s")):
            if slo.get(key) is not None:
                found[name] = float(slo[key]) / 1000.0
        if slo.get("attainment") is not None:
            found["attainment"] = float(slo["attainment"])
        return found

    @cached_property
    def percentiles(self) -> tuple[float, ...]:
        """Percentiles asked for in the configuration's `report`, together with those every report has."""
        report = self.config.get("report") or {}
        wanted = report.get("percentiles") or [] if isinstance(report, dict) else []
        return tuple(sorted({50.0, 90.0, 95.0, 99.0} | {float(value) for value in wanted}))

    @cached_property
    def num_devices(self) -> int:
        """Devices (GPUs) of all executors: the sum of tp times pp. 0 if the configuration does not say."""
        known = self.manifest.get("num_devices") or self.manifest.get("num_gpus")
        if isinstance(known, int):
            return known
        return sum(size for _, size in self._executor_sizes())

    @cached_property
    def reuses_blocks(self) -> bool:
        """Whether an executor caches the blocks of prefixes, by the configuration."""
        return any(
            isinstance(cache := group.get("kv_cache"), dict) and cache.get("enable_block_reuse") is True
            for _, group in self._executor_groups()
        )

    def _executor_sizes(self) -> Iterator[tuple[str, int]]:
        for role, group in self._executor_groups():
            size = int(group.get("tensor_parallel_size") or 1) * int(group.get("pipeline_parallel_size") or 1)
            for _ in range(int(group.get("num_instances") or 0)):
                yield role, size

    def _executor_groups(self) -> list[tuple[str, Any]]:
        """Role and keys of each entry of the configuration's cluster."""
        cluster = self.config.get("cluster") or {}
        if not isinstance(cluster, dict):
            return []
        groups: list[tuple[str, Any]] = []
        for instance in cluster.get("instances") or []:
            if isinstance(instance, dict):
                groups.append((str(instance.get("role", "mixed")), {"num_instances": 1, **instance}))
        for role in ("context", "generation", "mixed"):
            if isinstance(cluster.get(f"{role}_servers"), dict):
                groups.append((role, cluster[f"{role}_servers"]))
        return groups

    @cached_property
    def roles(self) -> dict[int, str]:
        """What each executor did, by id: the manifest's word, else the stages its requests stayed for."""
        seen: dict[int, set[str]] = {}
        for executor, stage in self.columns("stays", ["executor", "stage"]).drop_duplicates().itertuples(index=False):
            seen.setdefault(int(executor), set()).add(str(stage))
        found = {executor: stages.pop() if len(stages) == 1 else "mixed" for executor, stages in seen.items()}
        for executor in self.columns("steps", ["executor"])["executor"].unique():
            found.setdefault(int(executor), "idle")
        for entry in self.manifest.get("executors") or []:
            if isinstance(entry, dict) and "id" in entry and "role" in entry:
                found[int(entry["id"])] = str(entry["role"])
        return dict(sorted(found.items()))

    @cached_property
    def kv_bytes_per_token(self) -> int | None:
        """KV bytes of a token: the manifest's word, else that of the model's preset; None for another model."""
        value = self.manifest.get("kv_bytes_per_token")
        if isinstance(value, int):
            return value
        from ..core.model_shapes import DTYPE_BYTES, PRESETS

        model = self.config.get("model")
        shape = PRESETS.get(str(model.get("id"))) if isinstance(model, dict) else None
        if shape is None or not isinstance(model, dict):
            return None
        size = DTYPE_BYTES.get(str(model.get("dtype", shape.dtype)))
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * size if size else None


def _one_by_one(path: Path, names: Sequence[str]) -> pd.DataFrame:
    """The columns of `names` that the file has: one at a time is both Arrow's and numpy's while it is read."""
    import pandas as pd
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        there = [name for name in file.schema_arrow.names if name in names]
        columns = {name: file.read([name]).to_pandas()[name] for name in there}
        return pd.DataFrame(columns, index=pd.RangeIndex(file.metadata.num_rows), copy=False)


def _typed(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """Columns of numbers that hold none, or only missing values, as numbers all the same."""
    import pandas as pd

    numeric = [
        name
        for name, field in zip(columns_of(table), msgspec.structs.fields(TABLES[table]))
        if field.type in (int, int | None)
        and name in frame.columns
        and not pd.api.types.is_numeric_dtype(frame[name].dtype)
    ]
    return frame.astype(dict.fromkeys(numeric, "float64")) if numeric else frame


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ReportError(f"{path}: holds a {type(value).__name__}, where a mapping is expected")
    return value


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """All run directories at or below `paths`, each once, in the order given and then by name.

    A run directory is one that holds `manifest.json`, which is written last: what has none is unfinished and left out.
    Raises ReportError if a path does not exist or holds no run.
    """
    found: dict[Path, Run] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ReportError(f"{path}: no such file or directory")
        if path.is_file():
            raise ReportError(f"{path}: is a file; a run directory, or a directory that holds some, is expected")
        below = sorted(
            manifest.parent
            for manifest in path.rglob(MANIFEST)
            if not any(part.startswith(".") for part in manifest.relative_to(path).parts)  # a run being written
        )
        if not below:
            raise ReportError(f"{path}: no run found: neither it nor any directory below it holds a {MANIFEST}")
        for directory in below:
            found.setdefault(directory.resolve(), Run(directory))
    if not found:
        raise ReportError("no run directories were given")
    return list(found.values())
