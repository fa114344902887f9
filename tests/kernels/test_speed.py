"""IPOT's kernel and the packed encoder on a CPU beside their rivals: ratios in one process, interleaved, medians.

The quick tests are of the benchmarks themselves: that floors, peaks and rivals are what they are said to be.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from tests.bench import bench_encoder, bench_ipot, ipot_rivals, timing
from tests.bench.bench_encoder import OURS, Setting, measure
from tests.bench.bench_ipot import ratio
from tests.bench.ipot_rivals import Pairs
from vlscale.kernels.ipot import backends, cosine_cost

SMALL = (6, 6, 9, 32)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.alone
def test_ipot_forward_and_backward_against_the_eager_loop():
    why = backends.problem("cpu", torch.device("cpu"))
    if why:
        pytest.skip(why)
    assert ratio((96, 20, 36, 768)) >= 2.5


@pytest.mark.alone
@pytest.mark.parametrize(
    ("hidden", "names"),
    [
        (768, ("VisualBertModel, dynamic", "BertModel, dynamic")),
        pytest.param(1024, ("BertModel, dynamic", "UNITER, padded, dynamic, eager"), marks=pytest.mark.long),
    ],
)
def test_encoder_step_on_adaptive_region_counts_against_padded_rows(hidden, names):
    """The closest rivals: those that pad to the longest of all lengths pad more."""
    pytest.importorskip("transformers")
    first, *others = measure(True, Setting(32, 2, hidden, runs=3), names)
    assert first["way"] == OURS
    assert {row["way"] for row in others} == {*names}
    assert min(row["times"] for row in others) >= 1.5, others


@pytest.mark.parametrize("fixed", [False, True])
def test_the_padded_uniter_computes_what_the_packed_one_does(fixed):
    setting = Setting(5, 2, 64)
    examples = bench_encoder.make_examples(True, setting.rows)
    way = bench_encoder.padded_uniter(examples, setting, fixed)
    longest = 162 if fixed else int(examples.lengths.max())
    assert way.positions.tolist() == [longest] * 5
    way.model.eval()
    rows = bench_encoder.Padded.of(examples, longest, "cpu")
    packed = way.model.encode(examples.batch).hidden
    assert_close(bench_encoder.padded_hidden(way.model, examples.batch, rows)[rows.mask], packed, rtol=1e-4, atol=1e-5)
    assert_close(way.loss(), packed.square().mean())


def test_every_rival_is_made_and_the_peak_is_of_the_best_product(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_encoder, "SQUARE", 16)
    rows = measure(True, Setting(3, 1, 64, runs=1))
    assert sum(row["way"].startswith("UNITER, padded") for row in rows) == 2
    assert len(rows) == 9
    monkeypatch.setattr(bench_encoder, "with_best", lambda ways, *_: (dict.fromkeys(ways, 1e-9), 1.0))
    assert all(row["above_peak"] for row in measure(True, Setting(3, 1, 64), ("BertModel, dynamic",)))


def test_yardsticks_run_between_the_ways_and_their_best_run_counts(monkeypatch):
    order, clock, took = [], [0.0], iter([1.0, 4.0, 2.0, 8.0])  # the first round is not measured

    def yardstick():
        order.append("yardstick")
        clock[0] += next(took)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    medians, best = timing.with_best({"way": lambda: order.append("way")}, {"yardstick": (yardstick, 6.0)}, 3)
    assert order == ["way", "yardstick"] * 4
    assert medians == {"way": 0.0}
    assert best == 3.0


def test_the_floor_counts_real_pairs_alone(monkeypatch):
    pairs = Pairs.draw(SMALL, ragged=True)
    counted = zip(pairs.cu_words.diff().tolist(), pairs.cu_regions.diff().tolist(), strict=True)
    cost = 2 * 32 * sum(words * regions for words, regions in counted)
    assert bench_ipot.floor(pairs, "cpu", 1e6) == pytest.approx((cost / 1e6, 3 * cost / 1e6))
    assert cost < 2 * 32 * 6 * 6 * 9
    monkeypatch.setattr(bench_ipot, "floor", lambda *_: (10.0, 0.0))
    rows = bench_ipot.case(SMALL, True, "cpu", compile_too=False)
    assert all(row["below_floor"] for row in rows if "floor_s" in row)


def test_the_table_without_a_compiled_backend(monkeypatch, capsys):
    monkeypatch.setattr(bench_ipot, "kernels", lambda *_: {})
    rows = bench_ipot.case(SMALL, True, "cpu", compile_too=False)
    bench_ipot._print(SMALL, True, rows)
    assert bench_ipot.LOOP in capsys.readouterr().out


def test_the_highest_clock_is_asked_of_the_driver():
    def attribute(answer, number, device):
        answer._obj.value = 1_980_000 if (number, device.value) == (13, 40) else 0
        return 0

    def ordinal(answer, index):
        answer._obj.value = 40 + index
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGet=ordinal, cuDeviceGetAttribute=attribute)
    assert bench_ipot.highest_clock(driver, 0) == 1.98e9
    with pytest.raises(RuntimeError, match="does not tell the clock of GPU 1"):
        bench_ipot.highest_clock(driver, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_benchmark_runs_on_a_gpu():
    assert 1e8 < bench_ipot.highest_clock(ctypes.CDLL("libcuda.so.1"), torch.cuda.current_device()) < 1e10
    rows = bench_ipot.case(SMALL, True, "cuda", compile_too=False)
    assert any(row["way"] in backends.BACKENDS and "both_s" in row for row in rows)


@pytest.mark.parametrize("method", ["sinkhorn", "proximal"])
def test_pot_solves_ragged_batches_as_it_solves_each_example(method):
    pytest.importorskip("ot")
    pairs = Pairs.draw(SMALL, ragged=True)
    distances, *gradients = bench_ipot.trained(ipot_rivals.pot(pairs, method), bench_ipot.inputs(pairs, method))
    assert all(gradient.isfinite().all() for gradient in gradients)
    import ot

    how = {"reg": 0.5} if method == "sinkhorn" else {"reg": None, "inner_reg": 0.5, "inner_iter": 1}
    for row, (n, m) in enumerate(zip(pairs.cu_words.diff(), pairs.cu_regions.diff(), strict=True)):
        words, regions = (
            pairs.padded_words[row : row + 1, :n].detach(),
            pairs.padded_regions[row : row + 1, :m].detach(),
        )
        cost = cosine_cost(words, regions, n[None], m[None])
        plan = ot.batch.solve_batch(cost, max_iter=50, tol=0, method=method, grad="detach", **how).plan
        assert_close(distances[row], (cost * plan).sum(), rtol=1e-4, atol=1e-5)


def test_a_way_that_is_not_finite_is_not_timed(monkeypatch):
    def broken(pairs):
        return lambda: (pairs.padded_words.sum((1, 2)) + pairs.padded_regions.sum((1, 2))) * float("nan")

    monkeypatch.setattr(bench_ipot, "rivals_of", lambda *_: {"broken": broken, bench_ipot.LOOP: ipot_rivals.loop})
    rows = {row["way"]: row for row in bench_ipot.case(SMALL, True, "cpu", compile_too=False)}
    assert rows["broken"]["not_run"] == "not finite"
    assert "both_s" in rows[bench_ipot.LOOP]
