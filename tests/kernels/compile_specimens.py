"""Compiles specimens and reports as JSON: `python -m tests.kernels.compile_specimens 80 90 --only silu`.

A process of its own: the interpreter, which the other tests run kernels in, replaces the compiler for good.
"""

import argparse
import importlib
import json
import pkgutil

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels import specimens
from tests.kernels.specimens import Specimen


def all_specimens() -> list[Specimen]:
    """Those of every module in `tests.kernels.specimens`."""
    names = (f"{specimens.__name__}.{module.name}" for module in pkgutil.iter_modules(specimens.__path__))
    return [specimen for name in names for specimen in importlib.import_module(name).SPECIMENS]


def chosen(specimens: list[Specimen], arch: int) -> list[Specimen]:
    """What is compiled for an architecture: for 90 everything, else the first of each kernel with such codes (and of
    its form for newer GPUs) and what asks for it. All of it for all would be a third of the suite's time."""
    known, found = set(), []
    for specimen in specimens:
        form = specimen.kernel.fn, specimen.minimum_arch, *map(specimen.constants.get, ("PACKED", "BITS"))
        if arch >= specimen.minimum_arch and (arch == 90 or specimen.everywhere or form not in known):
            known.add(form)
            found.append(specimen)
    return found


def compile_for(specimen: Specimen, arch: int):
    """The compiled kernel of Triton, for a GPU of compute capability `arch`."""
    names = specimen.kernel.arg_names
    signature = {name: specimen.types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in specimen.aligned}
    constants = {(names.index(name),): value for name, value in specimen.constants.items()}
    source = ASTSource(specimen.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(specimen.options))


def report(arch: int, only: str) -> dict[str, dict]:
    """Name of each specimen to its shared memory in bytes and kinds of matrix instructions."""
    found = {}
    for specimen in all_specimens() if only else chosen(all_specimens(), arch):
        if arch >= specimen.minimum_arch and only in specimen.name:
            compiled = compile_for(specimen, arch)
            ptx = compiled.asm["ptx"]
            used = sorted(word for word in ("wgmma", "mma.sync", "tcgen05", "dp4a", "cp.async") if word in ptx)
            found[specimen.name] = {"shared": compiled.metadata.shared, "instructions": used}
    return found


def main() -> None:
    """Prints one JSON object: each architecture to its report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archs", type=int, nargs="+", help="compute capabilities, such as 90")
    parser.add_argument("--only", default="", help="specimens with this in their name, all of them on each")
    arguments = parser.parse_args()
    print(json.dumps({arch: report(arch, arguments.only) for arch in arguments.archs}))


if __name__ == "__main__":
    main()
