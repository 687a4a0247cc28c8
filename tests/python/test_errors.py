"""What bad input gets: one error of the right type that names the argument."""

import pytest
import torch

import localattn

randn = torch.randn
GOOD = {"query": randn(2, 6, 6, 4, 8), "key": randn(2, 6, 6, 4, 8), "value": randn(2, 6, 6, 4, 8), "kernel_size": 3}


def mask(*shape, **options):
    return torch.ones(shape, dtype=torch.bool, **options)


def all_as(dtype):
    return {name: GOOD[name].to(dtype) for name in ("query", "key", "value")}


VALUE_ERRORS = [
    ("query", {"query": randn(2, 4, 8)}),
    ("query", {"query": randn(1, 1, 1, 1, 1, 1, 1)}),
    ("query", {"query": randn(2, 6, 6, 4, 0), "key": randn(2, 6, 6, 4, 0)}),
    ("query", {name: randn(2, 6, 6, 0, 8) for name in ("query", "key", "value")}),
    ("key", {"key": randn(2, 6, 4, 8)}),
    ("key", {"key": randn(1, 6, 6, 4, 8)}),
    ("key", {"key": randn(2, 6, 6, 4, 7)}),
    ("key", {"key": randn(2, 6, 6, 2, 8), "value": randn(2, 6, 6, 2, 8)}),
    ("enable_gqa", {"key": randn(2, 6, 6, 2, 8), "value": randn(2, 6, 6, 2, 8)}),
    ("key", {"key": randn(2, 6, 6, 3, 8), "value": randn(2, 6, 6, 3, 8), "enable_gqa": True}),
    ("key", {"key": randn(2, 6, 6, 0, 8), "value": randn(2, 6, 6, 0, 8), "enable_gqa": True}),
    ("key", {"key": randn(2, 6, 6, 8, 8), "value": randn(2, 6, 6, 8, 8), "enable_gqa": True}),
    ("value", {"value": randn(2, 6, 5, 4, 8)}),
    ("value", {"value": randn(8)}),
    ("value", {"value": randn(2, 6, 6, 2, 8)}),
    ("value", {"value": randn(2, 6, 6, 4, 0)}),
    *(("kernel_size", {"kernel_size": k}) for k in (0, -3, (3, 0), (3,), (3, 3, 3), 2**31, 2**62)),
    *(("stride", {"stride": s}) for s in (0, -1, 4, (1, 4), (1,), 2**40)),
    *(("dilation", {"dilation": d}) for d in (0, -1, (1, 0), (1,), 2**40)),
    *(("is_causal", {"is_causal": c}) for c in ("yes", (True,), "")),
    *(("border", {"border": b}) for b in ("wrap", None, 0)),
    ("kernel_size", {"is_causal": "raster", "kernel_size": (3, 2)}),
    ("stride", {"is_causal": "raster", "stride": (1, 2)}),
    ("border", {"is_causal": "raster", "border": "shift"}),
    ("bias", {"bias": randn(2, 6, 6, 4, 8)}),
    ("bias", {"bias": randn(1, 2, 6, 6, 4, 9)}),
    ("bias", {"bias": randn(2, 5, 6, 4, 9)}),
    ("rel_pos_bias", {"rel_pos_bias": randn(4, 5, 4)}),
    ("rel_pos_bias", {"rel_pos_bias": randn(1, 5, 5)}),
    ("rel_pos_bias", {"rel_pos_bias": randn(4, 25)}),
    ("axis_bias", {"axis_bias": [None]}),
    ("axis_bias", {"axis_bias": randn(2, 6, 6, 4, 3)}),
    (r"axis_bias\[1\]", {"axis_bias": [randn(2, 6, 6, 4, 3), randn(2, 6, 6, 4, 2)]}),
    ("key_mask", {"key_mask": mask(2, 6, 5)}),
    ("key_mask", {"key_mask": mask(2, 6, 6, 1)}),
]
TYPE_ERRORS = [
    ("query", {"query": GOOD["query"].numpy()}),
    ("key", {"key": None}),
    ("value", {"value": [1.0]}),
    ("bias", {"bias": [1.0]}),
    ("key_mask", {"key_mask": [True]}),
    *(("query", all_as(dtype)) for dtype in (torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn)),
    ("key", {"key": GOOD["key"].double()}),
    ("value", {"value": GOOD["value"].half()}),
    ("bias", {"bias": randn(4, 9).double()}),
    ("rel_pos_bias", {"rel_pos_bias": randn(4, 5, 5).half()}),
    (r"axis_bias\[1\]", {"axis_bias": [None, randn(3).half()]}),
    ("key_mask", {"key_mask": randn(2, 6, 6)}),
    *(("kernel_size", {"kernel_size": k}) for k in (3.5, "3", None, (3, 3.0))),
    *(("stride", {"stride": s}) for s in (1.0, None)),
    *(("dilation", {"dilation": d}) for d in (1.0, None)),
    *(("is_causal", {"is_causal": c}) for c in (None, 2, (None, True))),
    *(("scale", {"scale": s}) for s in ("large", torch.ones(()))),
    *((name, {name: GOOD[name].to_sparse()}) for name in ("query", "key", "value")),
]
RUNTIME_ERRORS = [
    ("key", {"key": GOOD["key"].to("meta")}),
    ("value", {"value": GOOD["value"].to("meta")}),
    ("bias", {"bias": randn(9).to("meta")}),
    ("key_mask", {"key_mask": mask(2, 6, 6, device="meta")}),
]


def errors():
    for error, cases in ((ValueError, VALUE_ERRORS), (TypeError, TYPE_ERRORS), (RuntimeError, RUNTIME_ERRORS)):
        for number, (name, arguments) in enumerate(cases):
            yield pytest.param(error, name, arguments, id=f"{error.__name__}-{number}-{name}")


@pytest.mark.parametrize(("error", "name", "arguments"), list(errors()))
def test_bad_argument(error, name, arguments):
    with pytest.raises(error, match=name) as raised:
        localattn.local_attention(**{**GOOD, **arguments})
    assert type(raised.value) is error
    assert len(str(raised.value).splitlines()[0]) < 300


def test_good_arguments_are_good():
    localattn.local_attention(**GOOD)


@pytest.mark.parametrize(
    ("position", "name", "error", "replacement"),
    [
        (0, "grad_output", ValueError, randn(2, 6, 6, 4, 7)),
        (0, "grad_output", TypeError, randn(2, 6, 6, 4, 8).double()),
        (1, "grad_lse", ValueError, randn(2, 6, 6)),
        (1, "grad_lse", TypeError, randn(2, 6, 6, 4).half()),
        (5, "output", ValueError, randn(2, 6, 6, 4)),
        (6, "lse", ValueError, randn(2, 6, 6, 1)),
        (6, "lse", TypeError, randn(2, 6, 6, 4).double()),
    ],
)
def test_bad_argument_of_the_backward_operator(position, name, error, replacement):
    query, key, value = GOOD["query"], GOOD["key"], GOOD["value"]
    window = ([3, 3], [1, 1], [1, 1], [False, False], False, "mask", None)
    biases_and_mask = (None,) * 6
    output, lse = torch.ops.localattn.attention(query, key, value, *window, *biases_and_mask)
    arguments = [output, lse, query, key, value, output, lse, *window, *biases_and_mask, [True] * 8]
    torch.ops.localattn.attention_backward(*arguments)
    arguments[position] = replacement
    with pytest.raises(error, match=name):
        torch.ops.localattn.attention_backward(*arguments)


def test_operator_called_directly_checks_lengths():
    query = GOOD["query"]
    for position, name in enumerate(("kernel_size", "stride", "dilation", "is_causal")):
        window = [[3, 3], [1, 1], [1, 1], [False, False]]
        window[position] = window[position][:1]
        with pytest.raises(ValueError, match=name):
            torch.ops.localattn.attention(query, query, query, *window, False, "mask", None, *(None,) * 6)
    with pytest.raises(ValueError, match="border"):
        torch.ops.localattn.attention(
            query, query, query, [3, 3], [1, 1], [1, 1], [False, False], False, "wrap", None, *(None,) * 6
        )


def test_unknown_variant(monkeypatch):
    monkeypatch.setenv("LOCALATTN_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r'LOCALATTN_CPU_ISA is "mmx".*reference'):
        localattn.local_attention(**GOOD)
