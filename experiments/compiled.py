"""`python -m disagg.experiments.compiled`: a copy of the package whose hot modules are compiled, for long simulations.

The Python source is the source; nothing needs this. mypyc (which comes with mypy) and a C compiler turn the modules below,
as they stand, into extension modules in a folder of their own:

    python -m disagg.experiments.compiled            # into build/compiled, some minutes
    PYTHONPATH=build/compiled disagg run FILE        # the same results, faster

What is compiled is what runs for every simulated event: the cores' state machines and the simulator. Policies, and the
structs that travel, stay Python, so that a user's policies and the event logs are the same. `compiled_caches.h` makes that
cheap: compiled code remembers, at each place, how it read an attribute or made a struct of the type that it met there last,
and keeps integers and structs for the next use.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Final

from .compiled_names import bind_names

PACKAGE: Final = Path(__file__).resolve().parent.parent
FLOORS: Final = ("policies", "core", "simulator", "runtime", "reports", "experiments")
MODULES: Final = {
    "core": (
        "agenda batch_view blocks capacity chunk_sums decisions decode_batch dispatches epoch_times epochs executor"
        " executor_reports fleet free_blocks grants held_tasks kv_reader kv_source launch_gaps life_cycle local_kv"
        " measured_cost moves orchestrator prefix_cache prefix_index prompts queue_orders refusal roles routers scheduler"
        " step_sizes tails task timers unbound_kv visit visit_ends visit_rows"
    ),
    "simulator": "calendar cluster executor layerwise link sequences timing",
    "experiments": "arrivals lengths load_source planned simulated_load synthetic",
}

_SETUP: Final = """
import subprocess
import sys
from pathlib import Path

from mypyc.build import mypycify
from setuptools import setup

modules = mypycify(["--config-file=mypy.ini", *{files!r}], opt_level="{opt_level}")
cached = 0
for source in {{Path(name).resolve() for module in modules for name in module.sources}}:
    if not source.is_relative_to(Path.cwd()):
        continue  # a part of mypyc itself
    text = source.read_text()
    if {behind!r} in text:
        source.write_text(text.replace({behind!r}, {behind!r} + {caches!r}, 1))
        cached += 1
if not cached:
    print("this mypyc's C begins otherwise: compiled without caches", file=sys.stderr)


def compile_all(*flags):
    for module, (compiler, linker) in zip(modules, own_flags):
        module.extra_compile_args, module.extra_link_args = [*compiler, *flags], [*linker, *flags]
    setup(name="compiled", packages=[], ext_modules=modules)


own_flags = [(list(module.extra_compile_args), list(module.extra_link_args)) for module in modules]
if {training!r}:
    compile_all("-fprofile-generate")
    subprocess.run([sys.executable, *{training!r}], check=True)
    compile_all(*{by_profile!r})
else:
    compile_all()
"""
_MYPY: Final = """[mypy]
strict = True
ignore_missing_imports = True
follow_imports = silent
mypy_path = .
"""


CACHES: Final = "compiled_caches.h"  # beside this module: C that goes behind mypyc's own library
HEADERS: Final = "compiled_*.h"  # it, and what it includes
_BEHIND: Final = "#include <function_wrapper.c>\n"

# functions of the one library call each other, and Python, directly, and may be inlined: a twentieth faster
_C_FLAGS: Final = "-g0 -fno-semantic-interposition -fvisibility=hidden -fno-plt"

# A request runs through more code than the processor's cache for instructions holds. GCC, told by a run which code that is,
# puts it together, and what hardly ever happens elsewhere; what did not run is compiled as if nothing were known of it.
_TRAINING: Final = ("-m", "disagg.experiments.compiled_training")
_BY_PROFILE: Final = ("-fprofile-use", "-fprofile-partial-training", "-Wno-missing-profile")

SOURCES: Final = "sources.blake2b"  # in the output: what it was made from
BEGUN: Final = "sources.unfinished"  # in an output whose compiler has not ended, or failed


def digest_of_sources() -> str:
    """Changes whenever a source that the copy holds does."""
    digest = blake2b(digest_size=16)
    for floor in FLOORS:
        for path in sorted((PACKAGE / floor).rglob("*.py")):
            digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    for path in sorted(Path(__file__).parent.glob(HEADERS)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(output: Path, opt_level: int = 2) -> None:
    """Copy the package to `output`/disagg and compile the hot modules there. CalledProcessError if that fails.

    Twice, where the C compiler is GCC and optimises: the first copy is run, to learn which code is used.

    What is there is removed. FileExistsError if that is anything but an empty folder or an earlier copy.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is no folder")
    if output.is_dir() and any(output.iterdir()) and not any((output / name).is_file() for name in (SOURCES, BEGUN)):
        raise FileExistsError(
            f"{output} holds files, and no compiled copy; allowed: a new or empty folder, or a copy's"
        )
    digest = digest_of_sources()
    package = output / "disagg"
    shutil.rmtree(output, ignore_errors=True)
    package.mkdir(parents=True)
    (output / BEGUN).touch()
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for floor in FLOORS:
        shutil.copytree(PACKAGE / floor, package / floor, ignore=ignored)
    home = PACKAGE / "disagg" if (PACKAGE / "disagg").is_dir() else PACKAGE
    for name in ("__init__.py", "py.typed"):
        shutil.copy(home / name, package / name)
    files = [f"disagg/{floor}/{name}.py" for floor, names in MODULES.items() for name in names.split()]
    compiled = {Path(file).stem for file in files}
    for file in files:
        (output / file).write_text(bind_names((output / file).read_text(), compiled))
    compile_modules(output, files, opt_level, _TRAINING if opt_level and _has_gcc() else ())
    (output / SOURCES).write_text(digest)
    (output / BEGUN).unlink()


def _has_gcc() -> bool:
    """Whether Python's extension modules are compiled by GCC, which others call themselves, too."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return "Free Software Foundation" in done.stdout


def compile_modules(folder: Path, files: Sequence[str], opt_level: int = 2, training: Sequence[str] = ()) -> None:
    """Compile these Python files of `folder`, whose root it is, in their place. CalledProcessError if that fails.

    `opt_level` is the C compiler's: what is computed does not depend on it, how fast does; 0 takes half the time.
    `training`: arguments for Python to run what was compiled; GCC then compiles it again, by what has run.
    """
    include = f'#include "{Path(__file__).with_name(CACHES)}"\n'
    setup = _SETUP.format(
        files=list(files),
        opt_level=opt_level,
        behind=_BEHIND,
        caches=include,
        training=list(training),
        by_profile=list(_BY_PROFILE),
    )
    (folder / "setup.py").write_text(setup)
    (folder / "mypy.ini").write_text(_MYPY)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force", f"-j{os.cpu_count() or 1}"]
    flags = f"{os.environ.get('CFLAGS', '')} {_C_FLAGS}"
    environment = {**os.environ, "PYTHONPATH": str(folder), "CFLAGS": flags}
    subprocess.run(command, cwd=folder, check=True, env=environment)
    shutil.rmtree(folder / "build", ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/compiled"),
        help="a new or empty folder, or that of an earlier copy, which is made anew",
    )
    options = parser.parse_args()
    try:
        build(options.output.resolve())
    except FileExistsError as error:
        print(f"error: --output: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"the compiler failed with {error.returncode}: mypy and a C compiler are needed", file=sys.stderr)
        return 1
    print(f"compiled into {options.output}: run with PYTHONPATH={options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
