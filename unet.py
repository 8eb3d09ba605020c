"""The blind denoiser, its channel averages and its representation φ (paper A: §2.1, §2.3, Eq. 2, App. A.1).

    from unet import load_checkpoint, phi
    model, checkpoint = load_checkpoint("ckpt.pt")
    x_hat = model.denoise(y)                       # y: (N, C, H, W), a noisy picture of any size, in [0, 1]
    code = phi(model, x, sigma=0.3, draws=20)      # (N, width * 2**levels)

    levels = 3 (the paper's):   E1 ──────────── skip ──────────── D1 → x̂
                                 └ E2 ───────── skip ──────── D2 ┘
                                    └ E3 ────── skip ───── D3 ┘          └ 2×2 average pooling
                                       └─────── M ────────┘             ┘ 2×2 transposed convolution
"""
import argparse
import contextlib
import hashlib
import io
import math
import os
import pathlib
import shutil
import sys
import time
import zipfile

if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or later is needed; this is " + sys.version.split()[0])
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # read when torch is imported: idle threads sleep,
import torch                                              # and two processes on the same cores stay fast
import torch.nn.functional as F
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
        for k, (c, w) in enumerate(zip([channels, *widths], widths[:-1])):     # the very first layer has no
            self.blocks[f"E{k + 1}"] = nn.Sequential(*layer(c, w, normalise=k > 0), *layer(w, w))      # norm
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
        """ā at the input and output of every block (§2.1): {name: ((N, d_in), (N, d_out))}, in running order.

        A decoder block's input is its skip and what comes from below, concatenated. Errors: as `encode`.
        """
        averages = {}
        with contextlib.ExitStack() as hooks:             # taken off again at its end
            for name, block in self.blocks.items():
                def record(block, inputs, out, name=name):
                    averages[name] = inputs[0].mean((2, 3)), out.mean((2, 3))
                hooks.enter_context(block.register_forward_hook(record))
            self(y)
        return averages


# §2.3, the representation

@torch.no_grad()
def phi(model, x, sigma, draws=1, generator=None):
    """φ(x_σ) = E_z[ā_M(x + σz)] (§2.3), the mean over `draws` noise realisations: (N, width·2^levels).

    x: (N, C, H, W) in [0, 1]. sigma: a number, or one per picture (N,). generator: a torch.Generator on x's
    device. Only E1 … M run, without a gradient, on 2^20 pixels at a time. Errors: as `encode`.
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
    (n, c, h, w), total = x.shape, 0           # z is drawn channels last, as the network runs
    for _ in range(draws):
        z = torch.randn(n, h, w, c, generator=generator, device=x.device, dtype=x.dtype)
        y = torch.addcmul(x, sigma, z.permute(0, 3, 1, 2))
        total = total + torch.cat([model.encode(part)[0].mean((2, 3))
                                   for part in y.split(max(1, 2 ** 20 // (h * w)))])
    return total / draws


# What all scripts share: reading a checkpoint, writing a file, the status line, the end

FORMAT = "blind-denoiser-2"
ENTRIES = set("model weights size sigma_max mean flags training step elapsed fingerprint".split())


class UserError(ValueError):
    """Input that the user can mend. The scripts print it as one line and exit with code 2."""


def load_checkpoint(path, device="cpu"):
    """Rebuild a model from its file alone: (UNet in evaluation mode on `device`, the checkpoint's dict).

    The dict holds plain numbers, strings, lists and tensors: `model` (width, channels, levels), `size`
    (pixels), `sigma_max`, `mean` (the mean colour, in [0, 1]), `flags` (of the training), `training` (a
    summary), and here also `sha256` of the file. Nothing in the file is executed. Raises OSError, and
    UserError for what is not a whole checkpoint of ours.
    """
    data, checkpoint = pathlib.Path(path).read_bytes(), None
    with contextlib.suppress(Exception):                  # a damaged or malicious file raises nearly anything
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if archive.testzip() is None:                 # every member's CRC; torch.load reads none
                checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(f"{path}: not a checkpoint written by train.py, or damaged")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path}: a checkpoint of another version of train.py; train it again")
    try:
        if missing := ENTRIES - checkpoint.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        weights = {k: v.float() for k, v in checkpoint["weights"].items()}
        if not all(v.isfinite().all() for v in weights.values()):
            raise ValueError("weights that are not finite")
        with torch.device("meta"):                        # costs nothing, whatever the width says
            model = UNet(**checkpoint["model"])
        model.load_state_dict(weights, assign=True)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        detail = str(error).splitlines()[-1].strip()      # torch's last line says what does not fit
        raise UserError(f"{path}: damaged checkpoint ({detail})") from None
    checkpoint["sha256"] = hashlib.sha256(data).hexdigest()
    return model.to(device).requires_grad_().eval(), checkpoint


def temporary_name(target):
    """The file beside `target` that `write` fills first, this process's own."""
    return f"{target}.{os.getpid()}.tmp"


def check_outputs(paths, force=False):
    """Before the work: UserError if one of these files could not be written, or exists without `force`."""
    for path in paths:
        target = os.path.realpath(path)
        folder = os.path.dirname(target)
        if os.path.isdir(target):
            raise UserError(f"--out {path or repr(path)}: must name a file, not a folder")
        try:                                              # what the folder's rights say is no proof
            open(temporary_name(target), "xb").close()
            os.remove(temporary_name(target))
        except OSError as error:
            why = error.strerror.lower() if os.path.isdir(folder) else f"there is no folder {folder}"
            raise UserError(f"--out {path}: cannot be written ({why})") from None
        if os.path.exists(target) and not force:
            raise UserError(f"{path} exists: --force overwrites it, --out names another")


@contextlib.contextmanager
def write(path):
    """A file to write bytes to, which becomes `path` once it is whole: readers see the old file or the new.

    A link is followed. Whatever goes wrong, the old file is intact and nothing is left beside it.
    """
    target = os.path.realpath(path)
    temporary = temporary_name(target)
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


def on_terminal():
    """Is standard output a terminal, whose last line can be rewritten?"""
    return sys.stdout is not None and sys.stdout.isatty()


def say(text, end="\n"):
    """Print a line in place of the status line. Whatever happens to standard output, the work goes on."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank():   # torchrun: the first one speaks
        return
    try:
        print("\r\033[K" * on_terminal() + printable(text), end=end, flush=True)
    except (OSError, ValueError):                          # a closed pipe, a full disk
        sys.stdout = open(os.devnull, "w")


def printable(text):
    """`text` with what a terminal cannot show (bytes of a file name that are not UTF-8, newlines) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds):
    """45 s, 12.3 min, 5.1 h, 31 days."""
    for unit, length, limit in ("s", 1, 90), ("min", 60, 5400), ("h", 3600, 172800):
        if seconds < limit:
            return f"{seconds / length:.{0 if unit == 's' else 1}f} {unit}"
    return f"{seconds / 86400:,.0f} days"


class Progress:
    """The status line: rewritten in place on a terminal, a plain line now and then elsewhere.

    progress = Progress(begun); progress(fraction done, text). begun: what a run now resumed had done before.
    """

    def __init__(self, begun=0.0):
        self.begun, self.start, self.shown = begun, time.monotonic(), time.monotonic()

    def left(self, fraction):
        """Seconds left, by the rate so far."""
        done, taken = fraction - self.begun, time.monotonic() - self.start
        return taken * (1 - fraction) / done if done > 0 else math.inf

    def __call__(self, fraction, text):
        now, terminal = time.monotonic(), on_terminal()
        if fraction > self.begun and now - self.shown > (0.5 if terminal else 15):
            self.shown = now
            line = f"{duration(self.left(fraction))} left  {100 * fraction:3.0f} %  {text}"
            width = shutil.get_terminal_size().columns - 1 if terminal else None
            say(line[:width], end="" if terminal else "\n")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no guessing of shortened flags."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind, low, high=2 ** 60):
    """An argparse type: `kind` in [low, high], low excluded for floats; no NaN, no infinity."""
    least = f"{'above' if kind is float else 'at least'} {low:g}"
    most = f" and at most {high:g}" * (high < 2 ** 60)

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (kind is float and value == low):
            raise argparse.ArgumentTypeError(f"{text}: must be {least}{most}")
        return value
    parse.__name__ = "integer" if kind is int else "number"
    return parse


def run(main):
    """The last line of every script: run `main` and exit with the code that it returns.

    What the user can mend (UserError, a file, too little memory) is one line and exit code 2; Ctrl-C is 130,
    without a word.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")     # consoles that know no σ
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
        if not full and "t allocate memory" not in str(error):           # a RuntimeError, on a CPU
            raise
        trouble = f"out of memory; smaller settings need less ({str(error)[:60]})"
    say("", end="")                                       # takes the status line away
    print(f"{os.path.basename(sys.argv[0])}: {printable(trouble)}", file=sys.stderr)
    sys.exit(2)
