"""The data sets that come with the package, against facts that their sources print."""

import numpy as np

from ergodica.models.zoo import auto_mpg, digits
from tests.conftest import ROOT


def test_digits_have_the_class_counts_of_their_source():
    """UCI lists 178, 182, 177, … digits for the test set of which these are a copy."""
    data = digits()
    assert data.x.shape == (1797, 64)
    assert np.bincount(data.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (data.x.min(), data.x.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(data.x * 16, np.round(data.x * 16))
    assert data.x.dtype == np.float32
    assert data.y.dtype == np.int32


def test_auto_mpg_is_the_table_of_its_source():
    """Mean and range of the consumption of the 392 complete rows, as printed in textbooks: 23.4, 9.0 to 46.6."""
    data = auto_mpg()
    assert data.x.shape == (392, 8)
    assert (data.y.min(), data.y.max()) == (9.0, np.float32(46.6))
    assert abs(data.y.mean() - 23.45) < 0.01
    np.testing.assert_allclose(data.x.mean(0, dtype=float), 0.0, atol=1e-6)
    np.testing.assert_allclose(data.x.std(0, dtype=float), 1.0, atol=1e-6)
    weight = data.x[:, data.columns.index("weight")]
    assert abs(np.corrcoef(weight, data.y)[0, 1] + 0.8322) < 1e-3  # as printed with R's copy of the table


def test_every_data_file_has_a_licence():
    folder = ROOT / "ergodica" / "models" / "zoo" / "data"
    for file in folder.glob("*.npz"):
        assert (folder / f"LICENSE-{file.stem}").read_text().startswith(file.name)
