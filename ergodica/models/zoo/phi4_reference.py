r"""Answers for :math:`\phi^4` on a lattice: closed forms (free theory), transfer matrices (strips), and what is stored."""

import functools
import importlib.resources
import json
import math
from typing import NamedTuple

import numpy as np

from ergodica.models.zoo.target import ReferenceValue
from ergodica.models.zoo.wells import quartic_law

_STORED = "data/phi4.json"
_GRID = 2001
_NODES = {1: 64, 2: 32}
_ROUNDING = 1e-10
type Shape = tuple[int, int]


def free_precision(shape: Shape, hopping: float, quadratic: float) -> np.ndarray:
    r"""Eigenvalues of the precision matrix of the free theory at all momenta, (T, L).

    .. math:: K(p) = 2a - 4\kappa \sum_\mu \cos p_\mu
    """
    cosines = [np.cos(2 * np.pi * np.arange(n) / n) for n in shape]
    return 2 * quadratic - 4 * hopping * (cosines[0][:, None] + cosines[1][None, :])


def free_log_normaliser(shape: Shape, hopping: float, quadratic: float) -> ReferenceValue:
    r""":math:`\tfrac12 \sum_p \log(2\pi/K(p))`."""
    return ReferenceValue(float(0.5 * np.sum(np.log(2 * np.pi / free_precision(shape, hopping, quadratic)))))


def free_reference(shape: Shape, hopping: float, quadratic: float) -> dict[str, ReferenceValue]:
    r"""Expectations in the free theory, from the propagator :math:`1/K(p)`; that of :math:`|m|` as m is normal."""
    propagator = 1 / free_precision(shape, hopping, quadratic)
    rows, volume = shape[0], shape[0] * shape[1]
    cosines = np.cos(2 * np.pi * np.outer(np.arange(rows // 2 + 1), np.arange(rows)) / rows)
    values = {
        "abs_magnetisation": math.sqrt(2 * propagator[0, 0] / (math.pi * volume)),
        "susceptibility": propagator[0, 0],
        "square": propagator.mean(),
        "action": 0.5,
    }
    values |= {f"two_point[{t}]": c for t, c in enumerate(cosines @ propagator[:, 0] / volume)}
    return {name: ReferenceValue(float(value)) for name, value in values.items()}


class SlicedLattice(NamedTuple):
    r"""The transfer matrix between rows of the lattice, on products of n quadrature nodes.

    .. math:: M = D\, K^{\otimes L} D, \qquad K_{ij} = e^{-\kappa (u_i - u_j)^2}, \qquad
              D_\phi^2 = \prod_x w(\phi_x)\, e^{2\kappa\phi_x\phi_{x+1} + (2\kappa - a)\phi_x^2 - \lambda\phi_x^4}

    Attributes
    ----------
    nodes : array (n,)
    kernel : array (n, n)
    root : array (n,) * L
        D.
    fields : array (L, n, ..., n)
        Values of each site of a row.
    """

    nodes: np.ndarray
    kernel: np.ndarray
    root: np.ndarray
    fields: np.ndarray

    def apply(self, vector: np.ndarray) -> np.ndarray:
        """M times a vector (n^L,)."""
        value = self.root * vector.reshape(self.root.shape)
        for axis in range(self.root.ndim):
            value = np.moveaxis(np.tensordot(self.kernel, value, axes=(1, axis)), 0, axis)
        return (self.root * value).ravel()

    def matrix(self) -> np.ndarray:
        """M as an array (n^L, n^L)."""
        full = functools.reduce(np.kron, [self.kernel] * self.root.ndim)
        return self.root.ravel()[:, None] * full * self.root.ravel()


def sliced_lattice(
    width: int, hopping: float, quadratic: float, coupling: float, num_nodes: int, bonds: float = 3.0
) -> SlicedLattice:
    r"""Set up the transfer matrix for rows of ``width`` sites.

    The nodes are those of the Gauss rule for :math:`e^{-(a - b\kappa)\phi^2 - \lambda\phi^4}`, where b is ``bonds``: as
    if so many of the four neighbours followed the site. It should be about as wide as the law of a site in the lattice.
    """
    nodes, log_weights = _gauss_rule(quadratic - bonds * hopping, coupling, num_nodes)
    fields = np.stack(np.meshgrid(*[nodes] * width, indexing="ij"))
    neighbours = 2 * hopping * fields * (np.roll(fields, 1, axis=0) + fields)
    exponent = (neighbours - quadratic * fields**2 - coupling * fields**4).sum(0)
    for axis in range(width):
        exponent = exponent + log_weights.reshape([-1 if i == axis else 1 for i in range(width)])
    return SlicedLattice(nodes, np.exp(-hopping * (nodes[:, None] - nodes) ** 2), np.exp(0.5 * exponent), fields)


def _gauss_rule(square: float, quartic: float, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes, and logs of the weights for the integral of a function (the weight function divided out)."""
    exponent = np.polynomial.Polynomial([0.0, 0.0, -square, 0.0, -quartic])
    peak = max(0.0, -square) / (2 * quartic) if quartic > 0 else 0.0  # of the square of the field
    top = exponent(math.sqrt(peak))
    ends = (exponent - (top - 600.0)).roots()
    reach = np.abs(np.real(ends[np.abs(np.imag(ends)) < 1e-9 * (1 + np.abs(ends))])).max()
    grid = np.linspace(-reach, reach, _GRID)  # the trapezoidal rule converges faster than any power for such functions
    mass = np.exp(exponent(grid) - top)
    vectors = [np.sqrt(mass / mass.sum())]
    off = np.zeros(num_nodes)
    for k in range(1, num_nodes):  # Lanczos; the law is even, so that the diagonal of the Jacobi matrix is zero
        new = grid * vectors[-1] - (off[k - 1] * vectors[-2] if k > 1 else 0.0)
        for vector in vectors:
            new = new - vector * (vector @ new)
        off[k] = np.linalg.norm(new)
        vectors.append(new / off[k])
    nodes, eigenvectors = np.linalg.eigh(np.diag(off[1:], 1) + np.diag(off[1:], -1))
    nodes = 0.5 * (nodes - nodes[::-1])
    log_weights = np.log(eigenvectors[0] ** 2) + math.log(mass.sum() * (grid[1] - grid[0])) - (exponent(nodes) - top)
    return nodes, log_weights


def transfer_reference(
    lattice: SlicedLattice,
    num_rows: int,
    parameters: tuple[float, float, float],
    spectrum: tuple[np.ndarray, np.ndarray],
) -> dict[str, ReferenceValue]:
    r"""Expectations from eigenvalues :math:`\Lambda_i` and eigenvectors :math:`v_i` of the transfer matrix.

    .. math:: Z = \sum_i \Lambda_i^T, \qquad
              \langle f_t f_{t+s} \rangle = \frac1Z \sum_i \Lambda_i^{T-s}\, v_i^\top f M^s f v_i

    Parameters
    ----------
    lattice : SlicedLattice
    num_rows : int
        T.
    parameters : (hopping, quadratic, coupling)
    spectrum : (array (k,), array (n^L, k))
        All eigenpairs, or the largest; errors by those left out are of the order of the sum of :math:`\Lambda^{T/2}` over them.
    """
    values, vectors = spectrum
    hopping, quadratic, coupling = parameters
    shares = values / values.max()
    partition = np.sum(shares**num_rows)

    def correlation(f: np.ndarray, separation: int) -> float:
        total = 0.0
        for share, vector in zip(shares, vectors.T, strict=True):
            moved = f.ravel() * vector
            for _ in range(separation):
                moved = lattice.apply(moved) / values.max()
            total += share ** (num_rows - separation) * (vector * f.ravel() @ moved)
        return total / partition

    def mean(f: np.ndarray) -> float:
        return float(np.sum(shares**num_rows * (f.ravel() @ vectors**2)) / partition)

    fields = lattice.fields
    width = len(fields)
    row = (-2 * hopping * fields * np.roll(fields, 1, axis=0) + quadratic * fields**2 + coupling * fields**4).mean(0)
    two_point = [correlation(fields.mean(0), t) for t in range(num_rows // 2 + 1)]
    all_times = sum(two_point[min(t, num_rows - t)] for t in range(num_rows))
    bond = correlation(fields[0], 1)  # all sites of a row are alike
    found = {
        "log_normaliser": num_rows * math.log(values.max()) + math.log(partition),
        "susceptibility": width * all_times,
        "square": mean((fields**2).mean(0)),
        "action": mean(row) - 2 * hopping * bond,
    }
    found |= {f"two_point[{t}]": value for t, value in enumerate(two_point)}
    return {name: ReferenceValue(float(value)) for name, value in found.items()}


def strip_quadrature(
    shape: Shape, hopping: float, quadratic: float, coupling: float, num_nodes: int
) -> dict[str, ReferenceValue]:
    """Expectations and normaliser of a strip from all eigenpairs of its transfer matrix, of size ``num_nodes**L``."""
    lattice = sliced_lattice(shape[1], hopping, quadratic, coupling, num_nodes)
    spectrum = np.linalg.eigh(lattice.matrix())
    return transfer_reference(lattice, shape[0], (hopping, quadratic, coupling), (spectrum[0], spectrum[1]))


@functools.cache
def strip_reference(shape: Shape, hopping: float, quadratic: float, coupling: float) -> dict[str, ReferenceValue]:
    """All that is known of a strip of width 1 or 2, by quadrature.

    The error is the difference to the rule of three quarters as many nodes: 0 where that is rounding.
    """
    most = _NODES[shape[1]]
    found, coarse = (strip_quadrature(shape, hopping, quadratic, coupling, n) for n in (most, 3 * most // 4))

    def judged(name: str) -> ReferenceValue:
        value, error = found[name].value, abs(found[name].value - coarse[name].value)
        return ReferenceValue(value, 0.0 if error <= _ROUNDING * (1 + abs(value)) else error)

    values = {name: judged(name) for name in found}
    if shape == (1, 1):
        law = quartic_law(0.0, 4 * hopping - quadratic, coupling)
        values["abs_magnetisation"] = ReferenceValue(law.mean(np.abs))
    return values


@functools.cache
def _stored() -> list[dict]:
    with importlib.resources.files("ergodica.models.zoo").joinpath(_STORED).open(encoding="utf-8") as file:
        return json.load(file)["entries"]


def stored_reference(shape: Shape, hopping: float, quadratic: float, coupling: float) -> dict[str, ReferenceValue]:
    """Values that ``benchmarks/phi4_reference.py`` has stored for these parameters; none where it has not."""
    wanted = (hopping, quadratic, coupling)
    for entry in _stored():
        stored = (entry["kappa"], 1 - 2 * entry["coupling"], entry["coupling"])
        if tuple(entry["shape"]) == shape and all(map(math.isclose, stored, wanted)):
            return {name: ReferenceValue(*pair) for name, pair in entry["values"].items()}
    return {}
