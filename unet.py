"""The blind denoiser, its channel averages and its representation φ (paper A: §2.1, Eq. 2, App. A.1).

    from unet import load_checkpoint, phi
    model, checkpoint = load_checkpoint("ckpt.pt")
    x_hat = model.denoise(y)                       # y: (N, C, H, W), a noisy picture of any size, in [0, 1]
    code = phi(model, x, sigma=0.3, draws=20)      # (N, width * 2**levels)

    levels = 3 (the paper's):   E1 ──────────── skip ──────────── D1 → x̂
                                 └ E2 ───────── skip ──────── D2 ┘
                                    └ E3 ────── skip ───── D3 ┘          └ 2×2 average pooling
                                       └─────── M ────────┘             ┘ 2×2 transposed convolution
"""
import torch
import torch.nn.functional as F
from torch import nn

FORMAT = "blind-denoiser-1"


class UserError(ValueError):
    """Input that the user can mend. The scripts print it as one line and exit with code 2."""


# App. A.1, Architecture

def layer(c_in, c_out, normalise=True):
    """3×3 zero-padded convolution with bias, LayerNorm over (C, H, W), ReLU (App. A.1), as a list of modules.

    LayerNorm with one scale and shift per channel is GroupNorm with a single group: one fused kernel. Without
    the mean removal, half of M's channels die; without the convolution's bias the loss is half as large
    again.
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

    The network outputs x̂ itself, not the noise. A joint LayerNorm divides the noise's size out of every
    activation, so a network that had to output σz would have to recover it: at equal training its loss was
    almost three times as large.
    """

    def __init__(self, width=64, channels=3, levels=3):
        super().__init__()
        self.width, self.channels, self.levels = width, channels, levels
        widths = [width * 2 ** k for k in range(levels + 1)]
        self.blocks, self.up = nn.ModuleDict(), nn.ModuleDict()
        c = channels
        for k in range(levels):                           # the very first layer has no normalisation
            self.blocks[f"E{k + 1}"] = nn.Sequential(*layer(c, widths[k], normalise=k > 0),
                                                     *layer(widths[k], widths[k]))
            c = widths[k]
        self.blocks["M"] = nn.Sequential(*layer(c, widths[-1]), *layer(widths[-1], widths[-1]),
                                         *layer(widths[-1], widths[-1]))
        for k in reversed(range(levels)):
            last = layer(widths[k], widths[k]) if k else [nn.Conv2d(width, channels, 3, padding=1)]
            self.up[f"D{k + 1}"] = nn.ConvTranspose2d(widths[k + 1], widths[k], 2, stride=2)
            self.blocks[f"D{k + 1}"] = nn.Sequential(
                *layer(2 * widths[k], widths[k]),         # 2: the skip is concatenated
                *[m for _ in range(4) for m in layer(widths[k], widths[k])], *last)

    def _block(self, name, a, averages):
        out = self.blocks[name](a)
        if averages is not None:                          # ā_j of §2.1
            averages[name] = a.mean((2, 3)), out.mean((2, 3))
        return out

    def encode(self, y, averages=None):
        """E1 … M only: y (N, C, H, W) -> M's activation maps (N, d, H/2^levels, W/2^levels), list of skips.

        Raises ValueError if H or W is not a multiple of 2^levels. A dict given as `averages` is filled as by
        `activations`.
        """
        step = 2 ** self.levels
        if y.shape[2] % step or y.shape[3] % step:
            raise ValueError(f"picture of {y.shape[3]}×{y.shape[2]} pixels: both sides must be multiples of "
                             f"{step} (2^levels)")
        a, skips = y.contiguous(memory_format=torch.channels_last), []       # the faster layout everywhere
        for k in range(1, self.levels + 1):
            a = self._block(f"E{k}", a, averages)
            skips.append(a)
            a = F.avg_pool2d(a, 2)                        # H, W halve
        return self._block("M", a, averages), skips

    def forward(self, y, averages=None):
        """x̂(y), (N, C, H, W), if 2^levels divides both sides. Arguments and errors: as for `encode`."""
        a, skips = self.encode(y, averages)
        for k in range(self.levels, 0, -1):
            a = torch.cat([skips[k - 1], self.up[f"D{k}"](a)], dim=1)        # H, W double
            a = self._block(f"D{k}", a, averages)
        return a

    def denoise(self, y):
        """x̂(y) for pictures of any size, (N, C, H, W), reflected at the border to a multiple of 2^levels."""
        h, w = y.shape[2:]
        bottom, right = -h % 2 ** self.levels, -w % 2 ** self.levels
        # 'reflect' needs more pixels than it pads; tiny pictures repeat their border instead.
        mode = "reflect" if bottom < h and right < w else "replicate"
        padded = F.pad(y, (0, right, 0, bottom), mode) if bottom or right else y
        return self(padded)[:, :, :h, :w]

    def score(self, y):
        """s(y) = x̂(y) − y = σ² ∇log p_σ(y) (Eq. 2), (N, C, H, W).

        Eq. 1 as printed makes the network's output ≈ +σz, but Algorithm 1 *adds* s: with this sign (s ≈ −σz)
        both Eq. 2 and Algorithm 1 are right.
        """
        return self.denoise(y) - y

    def activations(self, y):
        """ā at the input and output of every block (§2.1): {name: ((N, d_in), (N, d_out))}, in running order.

        A decoder block's input is the concatenation of its skip and of what comes from below. Errors: as
        `encode`.
        """
        averages = {}
        self(y, averages)
        return averages


# §2.3, the representation

def phi(model, x, sigma, draws=1, generator=None, grad=False):
    """φ(x_σ) = E_z[ā_M(x + σz)] (§2.3), the mean over `draws` noise realisations: (N, width·2^levels).

    x: (N, C, H, W) in [0, 1]. sigma: a number, or one per picture (N,), in the unit of x. generator: a
    torch.Generator on x's device. Only the first half of the network runs; no gradient unless `grad`. Raises
    ValueError as `encode` does.
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
    n, c, h, w = x.shape                       # z is drawn channels last, as the network runs
    with torch.set_grad_enabled(grad):
        total = 0
        for _ in range(draws):
            z = torch.randn(n, h, w, c, generator=generator, device=x.device, dtype=x.dtype)
            total = total + model.encode(torch.addcmul(x, sigma, z.permute(0, 3, 1, 2)))[0].mean((2, 3))
        return total / draws


# Checkpoints

def load_checkpoint(path, device="cpu"):
    """Rebuild a model from its file alone: (UNet in evaluation mode on `device`, the checkpoint's dict).

    The dict holds plain numbers, strings, lists and tensors, among them `model` (width, channels, levels),
    `size` (pixels), `sigma_max`, `mean` (the mean colour, `channels` numbers in [0, 1]) and `training` (a
    summary). Raises UserError, in one line, for a missing file and for anything that is not a whole
    checkpoint of ours.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception:          # every kind of foreign, truncated or malicious file raises a type of its own
        raise UserError(f"{path}: not a checkpoint written by train.py (or cut short)") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: a torch file, but not a checkpoint written by train.py")
    try:
        model = UNet(**checkpoint["model"])
        model.load_state_dict(checkpoint["weights"], strict=True)
        for key in "size", "sigma_max", "mean", "training":
            checkpoint[key]
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: damaged checkpoint ({str(error).splitlines()[0]})") from None
    return model.to(device).eval(), checkpoint
