"""The blind denoiser, its channel averages and its representation φ (paper A: §2.1, §2.3, Eq. 2, App. A.1).

    from unet import load_checkpoint, phi
    model, checkpoint = load_checkpoint("ckpt.pt")
    x_hat = model.denoise(y)                       # y: (N, C, H, W), a noisy picture of any size, in [0, 1]
    code = phi(model, x, sigma=0.3, draws=20)      # (N, width * 2**levels)

    levels = 3 (the paper's):   E1 ──────────── skip ──────────── D1 → x̂
                                 └ E2 ───────── skip ──────── D2 ┘
                                    └ E3 ────── skip ───── D3 ┘          └ 2×2 average pooling
                                       └─────── M ────────┘             ┘ 2×2 transposed convolution

The second half of the file holds what all scripts share: checkpoints, files, the screen, pictures.
"""
import argparse
import contextlib
import functools
import hashlib
import io
import math
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # read when torch is imported: idle threads sleep,
import numpy as np                                        # and two processes on the same cores stay fast
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

# App. A.1, Architecture; Eq. 2, the score

def layer(c_in, c_out, normalise=True):
    """3×3 zero-padded convolution with bias, LayerNorm over (C, H, W), ReLU (App. A.1), as a list of modules.

    LayerNorm with one scale and shift per channel is GroupNorm with a single group. Without its mean removal
    half of M's channels die; without the convolution's bias the loss is half as large again.
    """
    norm = [nn.GroupNorm(1, c_out)] if normalise else []
    return [nn.Conv2d(c_in, c_out, 3, padding=1), *norm, nn.ReLU(inplace=True)]


def receptive_field(levels):
    """Side in pixels of what one value of M sees of the picture: 18, 40, 84, 172 for 1 … 4 levels."""
    side, stride = 1, 1
    for _ in range(levels):
        side += 2 * 2 * stride + stride                   # two 3×3 convolutions, one 2×2 pooling
        stride *= 2
    return side + 3 * 2 * stride                          # the three 3×3 convolutions of M


class Sides(NamedTuple):
    """ā at the two sides of a block, (N, d_in) and (N, d_out)."""
    input: torch.Tensor
    output: torch.Tensor


class UNet(nn.Module):
    """y = x + σz  ->  x̂(y) ≈ E[x | y] (Eq. 2), without being told σ.

    y: (N, channels, H, W), x in [0, 1]. `blocks` holds E1…, M, …D1 in the order in which they run, with 2, 3
    and 6 layers; E_k and D_k have width·2^(k-1) channels, M has width·2^levels.

    The network outputs x̂ itself, not the noise: a joint LayerNorm divides the noise's size out of every
    activation, so that one that had to output σz had almost three times the loss at equal training.
    """

    def __init__(self, width=64, channels=3, levels=3):
        super().__init__()
        self.width, self.channels, self.levels = width, channels, levels
        widths = [width * 2 ** k for k in range(levels + 1)]
        self.blocks, self.up = nn.ModuleDict(), nn.ModuleDict()
        for k, (c, w) in enumerate(zip([channels, *widths], widths[:-1])):
            # the very first layer has no LayerNorm
            self.blocks[f"E{k + 1}"] = nn.Sequential(*layer(c, w, normalise=k > 0), *layer(w, w))
        c, w = widths[-2:]
        self.blocks["M"] = nn.Sequential(*layer(c, w), *layer(w, w), *layer(w, w))
        for k in reversed(range(levels)):
            last = layer(widths[k], widths[k]) if k else [nn.Conv2d(width, channels, 3, padding=1)]
            self.up[f"D{k + 1}"] = nn.ConvTranspose2d(widths[k + 1], widths[k], 2, stride=2)
            self.blocks[f"D{k + 1}"] = nn.Sequential(
                *layer(2 * widths[k], widths[k]),         # 2: the skip is concatenated
                *[m for _ in range(4) for m in layer(widths[k], widths[k])], *last)

    def encode(self, y):
        """E1 … M only: y (N, C, H, W) -> M's activation maps (N, d, H/2^levels, W/2^levels), list of skips.

        Raises ValueError if H or W is not a multiple of 2^levels.
        """
        (h, w), step = y.shape[2:], 2 ** self.levels
        if h % step or w % step:
            raise ValueError(f"picture of {w}×{h} pixels: both sides must be multiples of {step} (2^levels)")
        a, skips = y.contiguous(memory_format=torch.channels_last), []       # the faster layout everywhere
        for k in range(1, self.levels + 1):
            a = self.blocks[f"E{k}"](a)
            skips.append(a)
            a = F.avg_pool2d(a, 2)                        # H, W halve
        return self.blocks["M"](a), skips

    def decode(self, a, skips):
        """D… D1: M's maps and the skips, as `encode` returns them -> x̂, (N, C, H, W)."""
        for k in range(self.levels, 0, -1):
            a = torch.cat([skips[k - 1], self.up[f"D{k}"](a)], dim=1)        # H, W double
            a = self.blocks[f"D{k}"](a)
        return a

    def forward(self, y):
        """x̂(y), (N, C, H, W), if 2^levels divides both sides. Errors: as `encode`."""
        return self.decode(*self.encode(y))

    def denoise(self, y):
        """x̂(y) for pictures of any size, (N, C, H, W), reflected at the border to a multiple of 2^levels."""
        h, w = y.shape[2:]
        bottom, right = -h % 2 ** self.levels, -w % 2 ** self.levels
        mode = "reflect" if bottom < h and right < w else "replicate"        # too small to be reflected
        return self(F.pad(y, (0, right, 0, bottom), mode))[:, :, :h, :w]

    def score(self, y):
        """s(y) = x̂(y) − y = σ² ∇log p_σ(y) (Eq. 2), (N, C, H, W).

        Eq. 1 as printed makes it ≈ +σz, but Algorithm 1 *adds* s: with this sign it and Eq. 2 are right.
        """
        return self.denoise(y) - y

    def activations(self, y):
        """ā at the input and output of every block (§2.1): {name: Sides}, in running order.

        A decoder block's input is its skip and what comes from below, concatenated. Errors: as `encode`.
        """
        averages = {}
        with contextlib.ExitStack() as hooks:             # taken off again at its end
            for name, block in self.blocks.items():
                def record(block, inputs, out, name=name):
                    averages[name] = Sides(inputs[0].mean((2, 3)), out.mean((2, 3)))
                hooks.enter_context(block.register_forward_hook(record))
            self(y)
        return averages


# §2.3, the representation

@torch.no_grad()
def expectation(f, x, sigma, draws=1, generator=None):
    """E_z[f(x + σz)], z ~ N(0, I), estimated by the mean over `draws` realisations of z.

    f: takes (N, C, H, W), gives a tensor. x: (N, C, H, W) in [0, 1]. sigma: a number, or one per picture
    (N,). generator: a torch.Generator on x's device. No gradient.
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
    n, c, h, w = x.shape
    total = 0
    for _ in range(draws):                                # z is drawn channels last, as the network runs
        z = torch.randn(n, h, w, c, generator=generator, device=x.device, dtype=x.dtype)
        total = total + f(torch.addcmul(x, sigma, z.permute(0, 3, 1, 2)))
    return total / draws


def average_M(model, y):
    """ā_M(y), the spatial averages of the middle block (§2.1): (N, C, H, W) -> (N, width·2^levels)."""
    return model.encode(y)[0].mean((2, 3))


def phi(model, x, sigma, draws=1, generator=None):
    """φ(x_σ) = E_z[ā_M(x + σz)] (§2.3), the mean over `draws` noise realisations: (N, width·2^levels).

    Arguments as for `expectation`. Only E1 … M run, on 2^20 pixels at a time. Errors: as `encode`.
    """
    def averages(y):
        parts = y.split(max(1, 2 ** 20 // (y.shape[2] * y.shape[3])))
        return torch.cat([average_M(model, part) for part in parts])

    return expectation(averages, x, sigma, draws, generator)


def fixed_phi(model, x, draws=20):
    """φ at σ = 0.3, (N, d), with the same noise for a row in every call: distances are measured in this φ."""
    parts = [phi(model, part, 0.3, draws, seeded(x.device, 77, i)) for i, part in enumerate(x.split(256))]
    return torch.cat(parts)


# Checkpoints: all that is needed to rebuild a network, in one file

FORMAT = "blind-denoiser-2"
ENTRIES = {"model": dict, "weights": dict, "size": int, "sigma_max": float, "mean": list, "flags": dict,
           "training": dict, "step": int, "elapsed": float, "fingerprint": str}
FLAGS = {"channels": int, "levels": int, "patches": bool, "val": float, "seed": int, "batch": int}


def load_checkpoint(path, device="cpu"):
    """Rebuild a network from its file alone: (UNet in evaluation mode on `device`, the checkpoint's dict).

    The dict holds plain numbers, strings, lists and tensors: `model` (width, channels, levels), `size`
    (pixels), `sigma_max`, `mean` (the mean colour, in [0, 1]), `flags` (the settings of the training),
    `training` (a summary), and here also `sha256` of the file. Nothing in the file is executed. Raises
    UserError for what is not a whole checkpoint of ours.
    """
    with explain(path, "not a checkpoint written by train.py, or damaged"):
        data = Path(path).read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if damaged := archive.testzip():              # every member's CRC; torch.load reads none
                raise ValueError(f"{damaged} is not what was written")
        checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if checkpoint.get("format") != FORMAT:
            raise ValueError(f"its format is {checkpoint.get('format')!r}, not {FORMAT!r}")
        check_entries(checkpoint, ENTRIES)
        check_entries(checkpoint["flags"], FLAGS)
        weights = {name: weight.float() for name, weight in checkpoint["weights"].items()}
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError("there are weights that are not finite")
        with torch.device("meta"):                        # costs nothing, whatever the width says
            model = UNet(**checkpoint["model"])
        model.load_state_dict(weights, assign=True)
    checkpoint["sha256"] = hashlib.sha256(data).hexdigest()
    return model.to(device).requires_grad_().eval(), checkpoint


def check_entries(entries, kinds):
    """Raises ValueError if a dict lacks an entry, or has one of another type."""
    for name, kind in kinds.items():
        if not isinstance(entries.get(name), kind):
            raise ValueError(f"{name} is missing or not of type {kind.__name__}")


def save_checkpoint(path, checkpoint):
    """Write a checkpoint's dict to `path`, whole or not at all. Raises UserError if it cannot be written."""
    buffer = io.BytesIO()                                 # torch's own writer hides why a disk refused it
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    with write(path) as file:
        file.write(buffer.getbuffer())


# Trouble, and files

class UserError(ValueError):
    """Something that the user can mend. The scripts print it as one line and exit with code 2."""


@contextlib.contextmanager
def explain(path, what):
    """Reading a file of the user's: whatever a library finds wrong with it becomes a UserError.

    It names the file, says what is wrong (`what`, as "not a picture") and gives the library's last line.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")  # a FIFO would be waited for
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:                            # damaged files raise nearly anything, by format
        words = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: {what} ({words.strip().splitlines()[-1].strip()})") from None


def check_outputs(paths, force=False, data=None):
    """Before the work: UserError if one of these files cannot be written, or exists and `force` is not given.

    data: the folder of pictures that is read; what we write there would be taken for one of them.
    """
    for path in paths:
        folder = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(folder):
            raise UserError(f"{path}: cannot be written, there is no folder {folder}")
        if os.path.isdir(path) or not os.access(folder, os.W_OK):
            raise UserError(f"{path}: cannot be written; --out names another file")
        if data and os.path.isdir(data) and Path(folder).is_relative_to(os.path.realpath(data)):
            raise UserError(f"{path}: lies among the pictures of {data}; --out names another place")
        if os.path.exists(path) and not force:
            raise UserError(f"{path}: exists; --force overwrites it, --out names another")


@contextlib.contextmanager
def write(path):
    """A file to write bytes to, which becomes `path` once it is whole: readers see the old file or the new.

    A link is followed. Whatever goes wrong, the old file is intact. Raises UserError if a disk refuses.
    """
    target = os.path.realpath(path)
    temporary = target + ".tmp"                           # one that a killed run left is written over
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({(error.strerror or str(error)).lower()})") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)                          # there only if something failed


def run(main):
    """The last line of every script: run `main` and exit with the code that it returns.

    What the user can mend (UserError, a file, too little memory) is one line and exit code 2; Ctrl-C is 130,
    without a word. Our own mistakes keep their traceback.
    """
    check_versions()
    if "OMP_NUM_THREADS" not in os.environ:
        # a second thread gains a fifth, or halves the speed where another program wants its core (results.md)
        torch.set_num_threads(1)
    if sys.stdout is None:                                # closed: python train.py >&-
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")                      # consoles that know no σ
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        trouble = str(error)
    except OSError as error:
        trouble = f"{error.filename or 'a file'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not full and "t allocate memory" not in str(error):                 # a RuntimeError, on a CPU
            raise
        trouble = f"out of memory; smaller settings need less ({str(error)[:60]})"
    say("", end="")                                       # takes the status line away
    print(f"{os.path.basename(sys.argv[0])}: {printable(trouble)}", file=sys.stderr)
    sys.exit(2)


def check_versions():
    """Exit with one line if Python or a package is older than what was tried."""
    for name, version, least in (("Python", sys.version, (3, 11)), ("torch", torch.__version__, (2, 5)),
                                 ("numpy", np.__version__, (1, 26)), ("pillow", PIL.__version__, (10, 1))):
        major, minor = version.split(".")[:2]
        if (int(major), int(minor)) < least:
            sys.exit(f"{name} {least[0]}.{least[1]} or later is needed; this is {version.split()[0]}")


# The command line and the screen

class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no guessing of shortened flags."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind, low, high=math.inf):
    """An argparse type: `kind` (int or float) in [low, high], low itself excluded for floats."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (kind is float and value == low):       # NaN is in no range
            raise argparse.ArgumentTypeError(f"{text}: must be {least} {low:g}{most}")
        return value

    least = "above" if kind is float else "at least"
    most = f" and at most {high:g}" if high < math.inf else ""
    parse.__name__ = "integer" if kind is int else "number"                    # argparse's name for it
    return parse


def choose_device(name=None):
    """A torch.device that works: the one named, or CUDA, MPS, CPU in this order. Raises UserError."""
    if name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"                       # torchrun: one GPU a process
    if name is None and torch.backends.mps.is_available():
        name = "mps"
    device = name or "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {device}: not available here") from None
    return torch.device(device)


def seeded(device, *words):
    """A torch.Generator on `device` for these words or integers; what was drawn before plays no part."""
    return torch.Generator(device).manual_seed(seed_of(*words))


def seed_of(*words):
    """A seed of 32 bits for these non-negative integers and strings: random streams have names."""
    numbers = [int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
               if isinstance(word, str) else word for word in words]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def on_terminal():
    """Is standard output a terminal, whose last line can be rewritten?"""
    return sys.stdout is not None and sys.stdout.isatty()


def main_process():
    """Is this the process that speaks and writes? Under torchrun there are others."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def say(text, end="\n"):
    """Print a line in place of the status line. Whatever happens to standard output, the work goes on."""
    if not main_process():
        return
    if on_terminal():
        text = "\r\033[K" + text                          # the start of the line; erase it
    try:
        print(text, end=end, flush=True)
    except (OSError, ValueError):                         # a closed pipe, a full disk
        sys.stdout = open(os.devnull, "w")


def printable(text):
    """`text` with what a terminal cannot show (bytes of a file name that are not UTF-8, newlines) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds):
    """45 s, 12.3 min, 5.1 h, 31 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.0f} days"


class Progress:
    """The status line: rewritten in place on a terminal, a plain line now and then elsewhere.

    progress = Progress(begun); progress(fraction done, text). begun: the fraction that earlier sessions had
    done.
    """

    def __init__(self, begun=0.0):
        self.begun, self.start, self.shown = begun, time.monotonic(), time.monotonic()

    def __call__(self, fraction, text):
        now, done = time.monotonic(), fraction - self.begun
        every = 0.5 if on_terminal() else 15
        if done <= 0 or now - self.shown < every:
            return
        self.shown = now
        left = (now - self.start) * (1 - fraction) / done
        line = f"{duration(left)} left  {100 * fraction:3.0f} %  {text}"
        if on_terminal():
            say(line[:shutil.get_terminal_size().columns - 1], end="")
        else:
            say(line)


def no_progress(fraction, text):
    """Take no notice of how far the work is."""


# Pictures: to tensors, from tensors, on a sheet

def to_batch(x, device="cpu"):
    """(B, H, W, C) uint8 -> (B, C, H, W) float in [0, 1] on `device`, channels-last in memory."""
    return torch.from_numpy(np.array(x, order="C")).to(device).permute(0, 3, 1, 2).float().div_(255)


def to_uint8(x):
    """An array in [0, 1] -> 0 … 255, rounded."""
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def to_image(x, side=None):
    """(C, H, W) in [0, 1] -> a PIL RGB image, enlarged without smoothing to about `side` pixels."""
    image = Image.fromarray(to_uint8(x.float().cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()))
    scale = max(1, round((side or image.width) / image.width))
    return image.resize((image.width * scale, image.height * scale), Image.NEAREST)


WORDS = {"σ": "sigma", "φ": "phi", "α": "alpha", "β": "beta", "λ": "lambda", "√": "sqrt ", "‖": "|", "₁": "1",
         "₂": "2", "−": "-", "–": "-", "→": "->", "≥": ">=", "≤": "<=", "…": "...", "≈": "~", "\u0302": ""}


@functools.lru_cache
def font(size=26):
    """DejaVu Sans, which has Greek letters, where the system has it; else Pillow's own, which has none."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def greek(text):
    """`text` as `font` can show it, in one line: where the system has no DejaVu, σ is written sigma."""
    text = printable(str(text))
    if "DejaVu" not in font().getname()[0]:
        text = "".join(WORDS.get(c, c) for c in text).encode("latin-1", "replace").decode("latin-1")
    return text


def caption(text, size=26, width=1600):
    """Text on white, `width` pixels wide, in as many lines as it needs. A PIL image."""
    pen, lines = font(size), [""]
    for word in greek(text).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if pen.getlength(longer) <= width - 12 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    image = Image.new("RGB", (width, int((1.3 * len(lines) + 0.3) * size)), "white")
    for k, line in enumerate(lines):
        ImageDraw.Draw(image).text((6, int((1.3 * k + 0.2) * size)), line, "black", pen)
    return image


def titled(text, image, width=None, size=22):
    """A PIL image with its title above, `width` pixels wide (default: as wide as the image)."""
    return grid([caption(text, size, width or image.width), image], 1, 2)


def grid(images, columns, gap=8):
    """PIL images of any size on one white sheet, `columns` in a row, top-aligned."""
    rows = [images[i:i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.height for image in row) + gap for row in rows]
    width = max(sum(image.width + gap for image in row) for row in rows) - gap
    sheet = Image.new("RGB", (width, sum(heights) - gap), "white")
    top = 0
    for row, height in zip(rows, heights):
        left = 0
        for image in row:
            sheet.paste(image, (left, top))
            left += image.width + gap
        top += height
    return sheet


def picture_rows(rows, side=96):
    """Rows of pictures with a name in front of each: rows is [(name, x (N, C, H, W))]. A PIL image."""
    left = 20 + int(max(font().getlength(greek(name)) for name, _ in rows))
    sheets = []
    for name, x in rows:
        pictures = [to_image(picture, side) for picture in x]
        sheets.append(grid([caption(name, width=left), *pictures], len(pictures) + 1, 4))
    return grid(sheets, 1, 4)
