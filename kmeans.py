"""K-means by hand in torch: exact, seeded by k-means++, most distances skipped (paper A: §2.5, App. B.3).

    python kmeans.py figures/phi.npz --clusters 100 --out clusters.npz     # the file that analyze.py writes
    python kmeans.py points.npy --clusters 100                             # any (n, d) array
    python kmeans.py --bench 50000 512 500                              # one fit against its matrix products
"""
import argparse
import math
import os
import sys
import time
import warnings

import numpy as np
import torch


class KMeans:
    """K-means: `n_clusters` centres that minimise the sum of squared distances of points to the nearest one.

    n_clusters: K. init: "k-means++", or (K, d) starting centres (App. B.3 starts from class centroids too);
    these leave nothing to chance, so `n_init` is then 1. n_init: restarts; the smallest inertia wins.
    max_iter, tol: a run ends when no label changes, when the centres' total squared movement is at most tol ×
    the mean variance of a column, or after max_iter iterations. seed: of the seeding; the same seed gives the
    same result. device: where to compute; None: where x is. chunk_bytes: working memory beside x, its copy
    and a few numbers per point and restart; None: 2²⁴ on a CPU, whose caches hold about that, else 2²⁸. It
    does not change the result. progress: called as progress(restart, iteration, labels changed).

    After `fit`: cluster_centers_ (K, d), labels_ (n,), inertia_ (the sum of squared distances, the unit of x
    squared), n_iter_; arrays if x was an array, tensors if it was a tensor. They agree with one another:
    every run ends with an assignment.
    """

    def __init__(self, n_clusters, init="k-means++", n_init=10, max_iter=300, tol=1e-4, seed=0, device=None,
                 chunk_bytes=None, progress=None):
        for name, value in dict(n_clusters=n_clusters, n_init=n_init, max_iter=max_iter).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if isinstance(init, str) and init != "k-means++":
            raise ValueError(f'init is "{init}"; it must be "k-means++" or an array (n_clusters, d)')
        self.n_clusters, self.init, self.n_init, self.max_iter = n_clusters, init, n_init, max_iter
        self.tol, self.seed, self.device, self.chunk_bytes = tol, seed, device, chunk_bytes
        self.progress = progress or (lambda *_: None)

    def fit(self, x):
        """Cluster x: (n, d), array or tensor, floating or integer. Returns self.

        float64 and integers of 32 bits or more are computed in float64, all else in float32. Raises
        ValueError for the wrong shape, NaN or infinite values, n < n_clusters. Warns if x has fewer distinct
        points than n_clusters; the surplus clusters are then empty.
        """
        self._numpy, K = not torch.is_tensor(x), self.n_clusters
        x = as_points(x, self.device)
        n, d = x.shape
        if n < K:
            raise ValueError(f"{n} points cannot make {K} clusters; ask for at most {n}")
        self._origin = x.mean(0)               # ‖x‖² − 2x·c + ‖c‖² cancels least around the mean
        x = x - self._origin
        xx = torch.linalg.vector_norm(x, dim=1).square_()                      # (n,) ‖x‖², no copy of x
        if not xx.isfinite().all():
            row = int((~xx.isfinite()).nonzero()[0])
            raise ValueError(f"row {row} is so large that its square overflows; scale the points down")
        if isinstance(self.init, str):
            starts = seed_centers(x, xx, K, self.n_init, self.seed, self.chunk_bytes)
        else:
            init = as_points(self.init, x.device, "init").to(x.dtype)
            if init.shape != (K, d):
                raise ValueError(f"init has shape {tuple(init.shape)}; it must be ({K}, {d})")
            starts = [init - self._origin]
        tol = self.tol * float(xx.double().mean() if x.device.type != "mps" else xx.mean()) / d
        self.inertia_ = math.inf
        for restart, centers in enumerate(starts):
            centers, labels, n_iter = lloyd(x, xx, centers, self.max_iter, tol, self.chunk_bytes,
                                            lambda *state: self.progress(restart, *state))
            inertia = float(own_distances(x, centers, labels, self.chunk_bytes).cpu().double().sum())
            if inertia < self.inertia_:
                self.inertia_, self.n_iter_, best = inertia, n_iter, (centers, labels)
        self._centers = best[0]
        found = len(best[1].unique())
        if found < K:
            why = ("fewer distinct points than clusters" if self.n_iter_ < self.max_iter
                   else "max_iter too small")
            warnings.warn(f"{found} clusters have points, {K} were asked for: {why}")
        self.cluster_centers_, self.labels_ = self._give(best[0] + self._origin), self._give(best[1])
        return self

    def predict(self, x):
        """The label (n,) of the nearest centre, x (n, d). ValueError before `fit`, or if d differs."""
        if not hasattr(self, "labels_"):
            raise ValueError("predict before fit: there are no centres yet")
        x, c = as_points(x, self._centers.device).to(self._centers.dtype), self._centers
        if x.shape[1] != c.shape[1]:
            raise ValueError(f"x has {x.shape[1]} columns, the centres have {c.shape[1]}")
        labels = [torch.addmm((c * c).sum(1), part - self._origin, c.T, alpha=-2).argmin(1)
                  for part in x.split(chunk_rows(self.chunk_bytes, x, len(c)))]
        return self._give(torch.cat(labels))

    def _give(self, tensor):
        return tensor.cpu().numpy() if self._numpy else tensor


def as_points(x, device=None, name="x"):
    """A finite (n, d) tensor in float32 or float64. Raises ValueError naming what is wrong and where."""
    x = torch.as_tensor(x, device=device)
    if x.ndim != 2 or not x.numel():
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (points, dimensions)")
    wide = x.dtype in (torch.float64, torch.int32, torch.int64) and x.device.type != "mps"
    x = x.to(torch.float64 if wide else torch.float32)
    bad = ~x.sum(1).isfinite()                 # a sum may overflow without a bad value: look closer
    if bad.any():
        rows = bad.nonzero()[:, 0]
        rows = rows[~x[rows].isfinite().all(1)]
        if len(rows):
            raise ValueError(f"{name} has NaN or infinite values, first in row {int(rows[0])}")
    return x


def chunk_rows(chunk_bytes, x, width):
    """How many rows of x, with `width` numbers beside each, fit the budget."""
    chunk_bytes = chunk_bytes or 2 ** (24 if x.device.type == "cpu" else 28)
    return max(1, chunk_bytes // (x.element_size() * (x.shape[1] + width)))


def own_distances(x, c, labels, chunk_bytes):
    """Squared distance of every point to its own centre, (n,), from differences: no cancellation."""
    rows = min(len(x), chunk_rows(chunk_bytes, x, x.shape[1]))
    difference, distance = x.new_empty(rows, x.shape[1]), []                   # fresh memory is slow
    for part, own in zip(x.split(rows), labels.split(rows)):
        out = torch.index_select(c, 0, own, out=difference[:len(own)]).sub_(part)
        distance.append(torch.linalg.vector_norm(out, dim=1).square_())
    return torch.cat(distance)


# Seeding: k-means++ (Arthur & Vassilvitskii 2007)

def seed_centers(x, xx, K, restarts, seed, chunk_bytes):
    """(restarts, K, d) starting centres, by greedy k-means++: D² sampling, the best of 2 + log K candidates.

    All restarts are seeded side by side: each step then reads x twice, not twice per restart, and that is
    what a step costs. Random numbers come from the CPU, so that all devices draw the same.
    """
    generator = torch.Generator().manual_seed(seed)
    (n, d), L = x.shape, 2 + int(math.log(K))
    eps = torch.finfo(x.dtype).eps
    rows = chunk_rows(chunk_bytes, x, 2 * restarts * L)

    def distances(to, a):                      # squared, of rows a … to the points `to`: (len(to), m)
        part = slice(a, a + rows)
        d2 = torch.addmm(xx[to, None] + xx[part], x[to], x[part].T, alpha=-2)
        return d2.masked_fill_(d2 < 8 * eps * (xx[to, None] + xx[part]), 0)    # rounding: the same point

    chosen = torch.empty(restarts, K, dtype=torch.long, device=x.device)
    nearest = x.new_full((restarts, n), math.inf)          # squared distance to the centres chosen so far
    for k in range(K):
        if k == 0:
            best = torch.randint(n, (restarts,), generator=generator).to(x.device)
        else:
            mass = nearest.to(sums_device(x), torch.float64).cumsum(1)
            u = torch.rand(restarts, L, generator=generator, dtype=torch.float64).to(mass.device)
            candidates = torch.searchsorted(mass, (1 - u) * mass[:, -1:]).clamp_(max=n - 1).to(x.device)
            potential = torch.zeros(restarts, L, dtype=torch.float64, device=mass.device)
            for a in range(0, n, rows):
                d2 = distances(candidates.flatten(), a).view(restarts, L, -1)
                potential += torch.minimum(d2, nearest[:, None, a:a + rows]).to(mass).sum(2)
            best = candidates.gather(1, potential.argmin(1, keepdim=True).to(x.device))[:, 0]
        chosen[:, k] = best
        for a in range(0, n, rows):
            part = nearest[:, a:a + rows]
            torch.minimum(part, distances(best, a), out=part)
    return x[chosen]


def sums_device(x):
    """Where sums are kept in float64: beside x, or on the CPU if x's device has no float64."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


# Lloyd's algorithm, skipping what cannot change

def lloyd(x, xx, centers, max_iter, tol, chunk_bytes, progress=lambda *_: None):
    """Lloyd's algorithm from `centers` (K, d) on x (n, d), xx = ‖x‖² (n,) -> centres, labels, iterations.

    Exact: the labels are those of computing every distance. Once most labels are settled, few centres move in
    an iteration, and only the distances to those are computed. For each point `own` is the squared distance
    to its centre and `low` a lower bound on those to all others, both less ‖x‖², which plays no part in
    comparisons. Centres that stand still are as far as they were: if the nearest of the point's own and the
    moved ones is below `low`, it is the nearest of all; else, for few points, every distance is computed.
    """
    (n, d), K, inf, eps = x.shape, len(centers), math.inf, torch.finfo(x.dtype).eps
    c, cc = centers.clone(), (centers * centers).sum(1)
    labels = torch.zeros(n, dtype=torch.long, device=x.device)
    own, low = x.new_empty(n), x.new_empty(n)
    rows = min(n, chunk_rows(chunk_bytes, x, 2 * K))
    products, gathered = x.new_empty(rows * K), x.new_empty(rows, d)           # fresh memory is slow

    def distances(y, some, norms):
        """‖c‖² − 2 y·c of points y (m, d) and centres `some` (k, d): (m, k), in a buffer."""
        out = products[:len(y) * len(some)].view(len(y), len(some))
        return torch.addmm(norms, y, some.T, alpha=-2, out=out)

    def search(where, y):
        """`labels`, `own` and `low` of points y = x[where] (m, d), from all their distances."""
        d2 = distances(y, c, cc)
        own[where], labels[where] = nearest = d2.min(1)
        low[where] = d2.scatter_(1, nearest[1][:, None], inf).amin(1)

    def compare(part, moved, place):
        """The same for the slice `part`, from the distances to the moved centres (k,); gives rows left open.

        place: (K,) position in `moved`, or −1.
        """
        d2 = distances(x[part], c[moved], cc[moved])       # (m, k)
        label, mine, bound = labels[part], own[part], low[part]                # views: written in place
        at = place[label]
        i = (at >= 0).nonzero()[:, 0]                      # their own centre has moved
        mine[i] = d2[i, at[i]]
        d2[i, at[i]] = inf
        other, k = d2.min(1)
        label.copy_(torch.where(other < mine, moved[k], label))
        torch.minimum(mine, other, out=mine)
        left = (mine > bound).nonzero()[:, 0] + part.start
        torch.minimum(bound, other, out=bound)             # also where `other` is now the label
        return left

    def reassign(moved):
        """New labels after the centres `moved` (k,) have moved."""
        parts = [slice(a, a + rows) for a in range(0, n, rows)]
        if len(moved) > 0.7 * K:                           # too many for bounds to decide
            for part in parts:
                search(part, x[part])
        elif len(moved):
            place = torch.full((K,), -1, device=x.device)
            place[moved] = torch.arange(len(moved), device=x.device)
            for part in torch.cat([compare(part, moved, place) for part in parts]).split(rows):
                search(part, torch.index_select(x, 0, part, out=gathered[:len(part)]))

    def fill_empty():
        """Give each empty cluster the point farthest from its centre; False if none is left to give."""
        distance = own_distances(x, c, labels, chunk_bytes)
        for k in (counts == 0).nonzero()[:, 0].tolist():
            free = distance.masked_fill((counts[labels] < 2) | (distance <= 8 * eps * xx), 0)
            i = int(free.argmax())
            if not free[i]:
                return False
            counts[labels[i]] -= 1
            counts[k] += 1
            labels[i], distance[i] = k, 0
        return True

    reassign(range(K))
    sums = torch.zeros(K + 1, d, dtype=torch.float64, device=sums_device(x))
    old = torch.full_like(labels, K)                       # row K of the sums: points of no cluster yet
    for n_iter in range(1, max_iter + 1):
        counts = labels.bincount(minlength=K)
        full = bool(counts.all()) or fill_empty()
        differ = (labels != old).nonzero()[:, 0]
        touched = torch.zeros(K + 1, dtype=torch.bool, device=x.device)
        for part in differ.split(max(1, rows // 4)):       # only what changed is summed
            y = torch.index_select(x, 0, part, out=gathered[:len(part)]).to(sums)
            sums.index_add_(0, labels[part].to(sums.device), y)
            sums.index_add_(0, old[part].to(sums.device), y, alpha=-1)
            touched[labels[part]] = touched[old[part]] = True
        old, before = labels.clone(), c.clone()
        means = (sums[:K] / counts.clamp(min=1).to(sums)[:, None]).to(x)
        c = torch.where((touched[:K] & (counts > 0))[:, None], means, c)
        cc, shifts = (c * c).sum(1), (c - before).square().sum(1)
        reassign(touched[:K].nonzero()[:, 0])
        changed = int((labels != old).sum())
        progress(n_iter, changed)
        settled = float(shifts.sum()) <= tol
        if not changed or settled and (not full or bool(labels.bincount(minlength=K).all())):
            break
    return c, labels, n_iter


# How clusters relate to classes (App. B.3)

def contingency(a, b):
    """Counts (A, B) of how often label i of `a` meets label j of `b`; a, b: (n,) of any type."""
    a, b = np.unique(a, return_inverse=True)[1], np.unique(b, return_inverse=True)[1]
    A, B = a.max() + 1, b.max() + 1
    return np.bincount(a * B + b, minlength=A * B).reshape(A, B)


def purity(clusters, classes):
    """Share of points that belong to the commonest class of their cluster, in (0, 1]."""
    return float(contingency(clusters, classes).max(1).sum() / len(clusters))


def normalised_mutual_information(a, b):
    """I(a; b) over the mean of H(a) and H(b): 1 for the same partition, 0 for independent ones."""
    p = contingency(a, b) / len(a)
    h = [-(q[q > 0] * np.log(q[q > 0])).sum() for q in (p.sum(1), p.sum(0), p.ravel())]
    return float(2 * (h[0] + h[1] - h[2]) / (h[0] + h[1])) if h[0] + h[1] > 0 else 1.0


# Command line

def load_points(path):
    """The (n, d) array of a .npy, or `phi` of a .npz with its other entries. Raises ValueError."""
    try:
        loaded = np.load(path, mmap_mode="r" if path.endswith(".npy") else None)
        if isinstance(loaded, np.ndarray):
            return loaded, {}
        with loaded:
            if "phi" not in loaded:
                raise ValueError(f"has no array `phi`, only {', '.join(loaded) or 'nothing'}")
            return loaded["phi"], {k: loaded[k] for k in ("paths", "labels") if k in loaded}
    except Exception as error:                 # whatever numpy finds wrong with the file
        raise ValueError(f"{path}: {error}") from None


def bench(n, d, K, device):
    """Print the time of one fit, of the matrix products that plain Lloyd needs, and their ratio."""
    r = np.random.default_rng(0)               # like φ: clustered, non-negative, many zeros
    x = np.maximum(r.standard_normal((K, d)) - 0.5, 0)[r.integers(K, size=n)] * r.gamma(4, 0.25, (n, 1))
    x = np.maximum(x + 0.6 * r.standard_normal((n, d)) - 0.3, 0)
    x = torch.from_numpy(x.astype(np.float32)).to(device)
    init, rows = x[torch.from_numpy(r.permutation(n)[:K]).to(device)], 2048

    def seconds(f):
        start = time.perf_counter()
        f()
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    model = KMeans(K, init=init, tol=0)
    fit = np.median([seconds(lambda: model.fit(x)) for _ in range(3)])
    out = x.new_empty(rows, K)
    product = lambda: [torch.mm(part, init.T, out=out[:len(part)]) for part in x.split(rows)]
    products = np.median([seconds(product) for _ in range(3)]) * (model.n_iter_ + 1)
    print(f"{n} × {d}, K = {K}, {x.device}: one fit {fit:.2f} s ({model.n_iter_} iterations), "
          f"its matrix products in full {products:.2f} s, ratio {fit / products:.2f}")


def main():
    """The command line's work."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = lambda message: (print(f"kmeans.py: {message}", file=sys.stderr), sys.exit(2))
    add = parser.add_argument
    add("points", nargs="?", help="phi.npz of analyze.py, or a .npy of shape (n, d)")
    add("--clusters", type=int, default=100, help="K (default: 100; the paper: 100, 1000 and 10000)")
    add("--n-init", type=int, default=10, help="restarts (default: 10)")
    add("--max-iter", type=int, default=300, help="iterations at most (default: 300)")
    add("--tol", type=float, default=1e-4, help="stop below this movement of the centres (default: 1e-4)")
    add("--seed", type=int, default=0, help="of the seeding (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--out", default="clusters.npz", help="default: %(default)s")
    add("--force", action="store_true", help="overwrite --out")
    add("--bench", type=int, nargs=3, metavar=("n", "d", "K"), help="only measure speed at this size")
    flags = parser.parse_args()
    try:
        torch.zeros(1, device=flags.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {flags.device}: not available here") from None
    if flags.bench:
        return bench(*flags.bench, flags.device)
    if not flags.points:
        raise ValueError("no file given; python kmeans.py phi.npz --clusters 100")
    if not flags.out.endswith(".npz"):
        raise ValueError(f"--out {flags.out}: the name must end in .npz")
    if os.path.exists(flags.out) and not flags.force:
        raise ValueError(f"--out {flags.out} exists; --force overwrites it")
    x, source = load_points(flags.points)
    start, end = time.time(), "\r" if sys.stderr.isatty() else "\n"

    def progress(restart, iteration, changed):
        done, taken = restart + iteration / flags.max_iter, time.time() - start
        if end == "\r" or iteration % 25 == 0:
            left = f"at most {taken * (flags.n_init / done - 1):.0f} s left"
            print(f"restart {restart + 1}/{flags.n_init}  iteration {iteration}  {changed} labels changed  "
                  f"{taken:.0f} s, {left}   ", end=end, file=sys.stderr, flush=True)

    model = KMeans(flags.clusters, n_init=flags.n_init, max_iter=flags.max_iter, tol=flags.tol,
                   seed=flags.seed, device=flags.device, progress=progress).fit(np.asarray(x))
    sizes = np.bincount(model.labels_, minlength=flags.clusters)
    print(f"{len(x)} points of {x.shape[1]} dimensions, {flags.clusters} clusters of {sizes.min()} to "
          f"{sizes.max()} points (median {np.median(sizes):.0f})\n"
          f"inertia {model.inertia_:.6g}, {model.n_iter_} iterations, {time.time() - start:.1f} s")
    known = np.asarray(source.get("labels", np.full(len(x), -1)))
    known = known >= 0 if known.dtype.kind in "iu" else known != ""
    if known.any() and len(known) == len(x):
        a, b = model.labels_[known], source["labels"][known]
        print(f"against {len(np.unique(b))} classes: purity {purity(a, b):.3f}, normalised mutual "
              f"information {normalised_mutual_information(a, b):.3f}")
    temporary = flags.out + ".tmp.npz"
    np.savez(temporary, centers=model.cluster_centers_, labels=model.labels_, inertia=model.inertia_,
             paths=source.get("paths", np.arange(len(x)).astype(str)))
    os.replace(temporary, flags.out)
    print(f"wrote {flags.out}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"kmeans.py: {error}", file=sys.stderr)
        sys.exit(2)
