"""Machine code of csrc/gemm.cu: wgmma, TMA and mbarriers are there; no spills; it fits.

Compiled with nvcc (about ten seconds), cached by the hash of the sources.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TEMPLATES = [
    (element, block_n, keep, direction)
    for element in ("Bf16", "Fp16")
    for block_n, keep in ((64, True), (64, False), (128, False), (256, False))  # keep: the filter
    for direction in ("forward", "backward")
]


@dataclass(frozen=True)
class Kernel:
    """What ptxas reported of one kernel, and its instructions."""

    registers: int
    spills: int  # bytes of stack, stores and loads
    code: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}", self.code))


@pytest.fixture(scope="module")
def compiled(csrc_build) -> tuple[str, str]:
    """What nvcc printed, and the disassembly by the tool that comes with Triton's package."""
    triton = pytest.importorskip("triton")
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not disassembler.exists():
        pytest.skip("this Triton carries no cuobjdump")
    try:
        command = [csrc_build.nvcc(), *csrc_build.NVCC_FLAGS, f"-I{CSRC}", "-Xptxas", "-v"]
    except csrc_build.BuildError as error:
        pytest.skip(str(error))
    folder = ROOT / "build/machine-code" / csrc_build.sources_digest()
    folder.mkdir(parents=True, exist_ok=True)
    log, code = folder / "log.txt", folder / "code.sass"
    if not code.exists():
        words = {"capture_output": True, "text": True, "check": True}
        target = str(folder / "gemm.o")
        done = subprocess.run([*command, "-c", str(CSRC / "gemm.cu"), "-o", target], **words)
        log.write_text(done.stdout + done.stderr)
        code.write_text(subprocess.run([disassembler, "-sass", target], **words).stdout)
    return log.read_text(), code.read_text()


@pytest.fixture
def kernel(compiled):
    """A function that gives the one kernel whose mangled name matches a pattern."""

    def find(name: str) -> Kernel:
        log, code = compiled
        [report] = [p for p in log.split("Compiling entry function")[1:] if re.search(name, p)]
        bodies = re.split(r"\n\s*Function : ", code)[1:]
        [body] = [p for p in bodies if re.search(name, p.split("\n", 1)[0])]
        spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
        assert len(spills) == 3
        registers = re.search(r"Used (\d+) registers", report).group(1)
        return Kernel(int(registers), sum(map(int, spills)), body)

    return find


def mangled(element: str, block_n: int, keep: bool, direction: str) -> str:
    """Pattern of a kernel's mangled name."""
    number = ("forward", "backward").index(direction)
    return rf"GemmKernelINS_4{element}ELi{block_n}ELb{int(keep)}ELNS_9DirectionE{number}EE"


@pytest.mark.parametrize(("element", "block_n", "keep", "direction"), TEMPLATES)
def test_machine_code(kernel, element, block_n, keep, direction):
    code = kernel(mangled(element, block_n, keep, direction))
    # 384 threads with 168 registers at entry are the whole register file: 65,536.
    assert code.registers == 168
    assert code.spills == 0
    assert code.count("LDL") == code.count("STL") == 0
    # Four 16-deep steps by two halves of 64 rows, in one unrolled slice; of 256 columns by one, the
    # other half is the other consumer's. Descriptors alone: no operand lies in registers.
    products = 4 if block_n == 256 else 8
    suffix = ".BF16" if element == "Bf16" else " "
    found = rf"HGMMA\.64x{block_n}x16\.F32{re.escape(suffix)}\s*R\d+, gdesc"
    assert code.count(found) == code.count("HGMMA") == products
    assert code.count("UTMALDG.4D.IM2COL") >= 1
    assert code.count("UTMALDG.2D") >= 1
    # Each block of a cluster loads half of the filter's tile, for both.
    boxes = 2 if block_n == 256 and direction == "backward" else 1
    assert code.count(r"UTMALDG\.3D\.MULTICAST") == code.count("UTMALDG.3D") == boxes
    assert code.count("UCGABAR_WAIT") == 2
    # Where the blocks wait for each other, at the start and the end; never within the loops.
    assert code.count(r"MEMBAR\.ALL\.GPU") == code.count(r"CCTL\.IVALL") == 2
    # Rows of a tile that follow each other, and rows that do not.
    assert code.count(r"UBLKPF\.L2") == 2 * (1 if direction == "forward" else 3)
    assert code.count("SYNCS.PHASECHK.TRANS64.TRYWAIT") >= 2
    assert code.count("USETMAXREG.DEALLOC") == code.count("USETMAXREG.TRY_ALLOC") == 1
    # 16 bytes per lane in the epilogue, nothing narrower.
    assert code.count(r"STG\.E\.128") >= block_n // 32 * 4
    assert len(re.findall(r"STG\.E(?!\.128)", code.code)) <= (
        0 if direction == "forward" else block_n // 32
    )


# What must happen in this order; the next one is looked for behind the one before.
TURN = r"BAR\.ARV"  # the other consumer's turn, while the last slice is at work
CONSUMER = (
    r"USETMAXREG\.TRY_ALLOC",
    r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",  # data is there
    r"WARPGROUP\.ARRIVE",  # wgmma.fence
    r"HGMMA\S* R\d+, gdesc\[\S+, R\d+, gsb0",  # the last of a slice, with its commit
    r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1 ",
    r"SYNCS\.ARRIVE\.TRANS64\.RED",  # the slice before is free, in both blocks
    TURN,
    r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0 ",
    r"SYNCS\.ARRIVE\.TRANS64\.RED",
    r"STG\.E\.128",
)
PRODUCER = (
    r"USETMAXREG\.DEALLOC",
    r"UTMACCTL\.PF",
    r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",  # the stage is free
    r"SYNCS\.ARRIVE\.TRANS64 ",  # bytes are announced before they can come
    r"UTMALDG",
    r"UTMALDG\.3D\.MULTICAST",
    r"UCGABAR_ARV",
    r"UCGABAR_WAIT",
    r"EXIT",
)
KEEPING_PRODUCER = (
    r"USETMAXREG\.DEALLOC",
    r"UTMACCTL\.PF",
    r"SYNCS\.ARRIVE\.TRANS64 ",  # the filter is announced, and loaded once
    r"UTMALDG\.3D\.MULTICAST",
    *(pattern for pattern in PRODUCER[2:] if "3D" not in pattern),
)


@pytest.mark.parametrize(("element", "block_n", "keep", "direction"), TEMPLATES)
@pytest.mark.parametrize("role", [CONSUMER, PRODUCER], ids=["consumer", "producer"])
def test_order_of_machine_code(kernel, role, element, block_n, keep, direction):
    """No compiler moved a wait, a release or a fence past what it guards."""
    code, position = kernel(mangled(element, block_n, keep, direction)).code, 0
    turns = block_n < 256  # else both consumers multiply the same tile
    if not turns:
        role = tuple(pattern for pattern in role if pattern is not TURN)
    for pattern in KEEPING_PRODUCER if keep and role is PRODUCER else role:
        found = re.compile(pattern).search(code, position)
        assert found, f"{pattern} is not behind {position}"
        position = found.end()
    # One place each: what is in order once is in order.
    for once in (r"WARPGROUP\.ARRIVE", r"gsb0, 0x1 ", r"gsb0, 0x0 ", ", gsb0"):
        assert len(re.findall(once, code)) == 1, once
    assert len(re.findall(TURN, code)) == turns


def test_compiler_does_not_serialise_wgmma(compiled):
    log, _ = compiled
    assert "C75" not in log, log  # C7508: setmaxnreg ignored; C7510, C7514: wgmma serialised
    assert "error" not in log


def test_column_sums_kernel(kernel):
    code = kernel("SumKernel")
    assert code.registers <= 64
    assert code.spills == 0
