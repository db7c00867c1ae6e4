import pytest

from tracknet.metrics import FrameResult, average_precision, count, rates, score


def frame(true, xy=(0.0, 0.0), confidence=1.0, visibility=1):
    return FrameResult("c", 0, visibility if true else 0, true, xy, confidence)


RESULTS = [
    frame((10.0, 10.0), (13.0, 14.0)),  # 5 px off
    frame((10.0, 10.0), (10.0, 12.0)),  # 2 px off
    frame((10.0, 10.0), confidence=0.1, visibility=2),  # missed
    frame(None, confidence=0.9),  # invented
    frame(None, confidence=0.2),  # rightly none
]


def test_each_frame_has_the_outcome_of_the_taxonomy():
    assert [r.outcome(4, 0.5) for r in RESULTS] == ["FP1", "TP", "FN", "FP2", "TN"]
    assert RESULTS[0].outcome(5, 0.5) == "TP"  # the tolerance itself is inside


def test_rates_follow_their_definitions():
    values = rates({"TP": 6, "FP1": 2, "FP2": 1, "FN": 3, "TN": 4})
    assert values["precision"] == 6 / 9
    assert values["recall"] == 6 / 9
    assert values["recall_strict"] == 6 / 11
    assert values["f1"] == pytest.approx(2 * (6 / 9) ** 2 / (12 / 9))
    assert values["f1_strict"] == pytest.approx(2 * (6 / 9) * (6 / 11) / (6 / 9 + 6 / 11))
    assert values["accuracy"] == 10 / 16


def test_nothing_to_divide_by_is_zero_not_an_error():
    assert set(rates(dict.fromkeys(("TP", "FP1", "FP2", "FN", "TN"), 0)).values()) == {0.0}


def test_score_counts_once_and_sweeps():
    scores = score(RESULTS, 4, 0.5)
    assert (scores["tp"], scores["fp1"], scores["fp2"], scores["fn"], scores["tn"]) == (1, 1, 1, 1, 1)
    assert scores["median_error_px"] == pytest.approx(3.5)
    assert scores["per_visibility"]["2"]["FN"] == 1
    assert [row["tolerance_px"] for row in scores["sweep"]] == list(range(1, 21))
    f1 = [row["f1_strict"] for row in scores["sweep"]]
    assert f1 == sorted(f1) and f1[0] < f1[-1]


def test_average_precision_by_hand():
    results = [
        frame((0.0, 0.0), (0.0, 0.0), 0.9),  # hit: precision 1
        frame(None, confidence=0.8),
        frame((0.0, 0.0), (1.0, 0.0), 0.7),  # hit: precision 2/3
        frame((0.0, 0.0), (50.0, 0.0), 0.6),
    ]
    assert average_precision(results, 4) == pytest.approx((1 + 2 / 3) / 3)


def test_the_threshold_itself_detects():
    assert count([frame((0.0, 0.0), confidence=0.5)], 4, 0.5)["TP"] == 1
