"""`rerankkit doctor`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check this machine: versions, processor, memory, devices, plugins; exit code 1 if something is wrong."""
    import importlib
    import os
    import platform

    from rerankkit.plugins import load_plugins
    from rerankkit.store import PACKAGES, version_of

    problems: list[str] = []
    facts: dict[str, object] = {"python": platform.python_version(), "cpu_count": os.cpu_count()}
    for package in PACKAGES:
        facts[package] = version_of(package)
        try:
            importlib.import_module(package)
        except Exception as error:
            problems.append(f"{package} cannot be imported: {error}")
    if not problems:
        import torch

        facts["torch threads"] = torch.get_num_threads()
        facts["bfloat16 in hardware"] = "avx512_bf16" in torch.__config__.show() or _cpu_has("avx512_bf16")
        facts["processes"] = _processes()
        facts["peft, for adapters"] = version_of("peft")
        facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    for plugin in load_plugins().loaded:
        facts[f"plugin {plugin.name}"] = f"{plugin.distribution} {plugin.version}"
        if plugin.error or plugin.warning:
            problems.append(f"plugin {plugin.name}: {plugin.error or plugin.warning}")
    if as_json:
        print(json.dumps({"facts": facts, "problems": problems}))
    else:
        for name, value in facts.items():
            print(f"{name:<24}{', '.join(value) if isinstance(value, list) else value}")
        for problem in problems:
            print(f"problem: {problem}")
        print("\nall is well" if not problems else "")
    if problems:
        raise typer.Exit(1)


def _processes() -> str:
    """What accelerate sees: how many processes, of which kind, and where this one is."""
    import torch
    from accelerate import PartialState

    from rerankkit import processes

    state = PartialState(cpu=not torch.cuda.is_available())
    seen = f"{state.num_processes} ({state.distributed_type.value}), this is {state.process_index} on {state.device}"
    processes.leave()
    return seen


def _cpu_has(flag: str) -> bool:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return any(flag in line for line in file if line.startswith("flags"))
    except OSError:
        return False
