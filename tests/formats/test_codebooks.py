"""Code tables and thresholds, bit for bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from qtool.formats import codebooks
from qtool.formats.codebooks import (
    FP4_CODE,
    FP4_MAGNITUDE_CODES,
    FP4_THRESHOLDS,
    NF4_CODE,
    NF4_THRESHOLDS,
    PADDING_CODES,
    dynamic_map,
    dynamic_thresholds,
)
from tests.backends.golden import read_code_tables

SHA256 = {
    "nf4": "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a",
    "fp4": "b830bcf8857895e5676b8e2ce608a60bb8af9b3ce6270073e9de34814196f09c",
    "signed": "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    "unsigned": "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}
TABLES = {
    "nf4": NF4_CODE,
    "fp4": FP4_CODE,
    "signed": dynamic_map(),
    "unsigned": dynamic_map(signed=False),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_the_published_bytes(name):
    assert TABLES[name].dtype == np.float32
    assert hashlib.sha256(TABLES[name].tobytes()).hexdigest() == SHA256[name]


def test_tables_are_the_ones_that_bitsandbytes_cuda_stored(test_data):
    stored = read_code_tables(test_data)
    for name, table in (("nf4_map", NF4_CODE), ("fp4_map", FP4_CODE)):
        assert stored[name].tobytes() == table.tobytes()
    assert stored["nested_quant_map"].tobytes() == dynamic_map().tobytes()


def test_tables_are_the_ones_that_bitsandbytes_computes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for name in ("nf4", "fp4"):
        computed = functional.get_4bit_type(name, device="cpu").numpy()
        assert computed.tobytes() == TABLES[name].tobytes()
    for name, signed in (("signed", True), ("unsigned", False)):
        computed = functional.create_dynamic_map(signed=signed).numpy()
        assert computed.tobytes() == TABLES[name].tobytes()


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_hold_256_different_values_in_order(signed):
    table = dynamic_map(signed)
    assert table.size == 256
    assert (np.diff(table) > 0).all()
    assert table[127 if signed else 0] == 0 and table[255] == 1


def test_nf4_thresholds_are_the_constants_of_the_cuda_decision_tree():
    constants = """
        -.8480964004993439 -.6106329262256622 -.4599952697753906 -.33967943489551544
        -.23460740596055984 -.13791173323988914 -.045525018125772476 .03979014977812767
        .1202552504837513 .2035212516784668 .2920137718319893 .3893125355243683
        .5016634166240692 .6427869200706482 .8614784181118011
    """
    expected = np.array(constants.split(), dtype=np.float32)
    assert NF4_THRESHOLDS.tobytes() == expected.tobytes()


def test_fp4_thresholds_lie_between_the_magnitudes_in_order():
    magnitudes = FP4_CODE[FP4_MAGNITUDE_CODES]
    assert (magnitudes[:-1] < FP4_THRESHOLDS).all() and (magnitudes[1:] > FP4_THRESHOLDS).all()
    np.testing.assert_allclose(FP4_THRESHOLDS, (magnitudes[:-1] + magnitudes[1:]) / 2, rtol=2e-6)


def test_a_value_midway_between_two_codes_of_the_dynamic_map_takes_the_even_one():
    table, thresholds = dynamic_map(), dynamic_thresholds()
    midpoints = (table[:-1] + table[1:]) * np.float32(0.5)
    codes = np.searchsorted(thresholds, midpoints, side="left")
    assert (codes % 2 == 0).all()
    assert (np.abs(codes - (np.arange(255) + 0.5)) == 0.5).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_padding_is_the_code_of_zero(quant_type):
    assert codebooks.CODES[quant_type][PADDING_CODES[quant_type]] == 0


def test_tables_cannot_be_changed_by_accident():
    for table in (*TABLES.values(), NF4_THRESHOLDS, dynamic_thresholds()):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 3
