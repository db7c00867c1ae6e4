import pytest

from tracknet.tracking.metrics import FrameResult, average_precision, count, find_events, rates, score, score_events
from tracknet.tracking.records import Detection


def frame(true, xy=(0.0, 0.0), confidence=1.0, visibility=1):
    return FrameResult("c", Detection(0, xy, confidence), visibility if true else 0, true)


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


def test_average_precision_takes_the_best_precision_at_that_recall_or_a_higher_one():
    """A confident mistake costs what it must, and not more: after it come two hits, at precision 1/2 and 2/3."""
    results = [
        frame(None, confidence=0.9),
        frame((0.0, 0.0), (0.0, 0.0), 0.8),
        frame((0.0, 0.0), (3.0, 4.0), 0.7),
    ]
    assert average_precision(results, 5) == pytest.approx(2 / 3)  # the tolerance itself is inside
    assert average_precision(results, 4.9) == pytest.approx(1 / 2 / 2)
    assert average_precision(results[::-1], 5) == pytest.approx(2 / 3)  # by confidence, in whatever order they come


def test_without_a_ball_there_is_no_average_precision():
    assert average_precision([frame(None), frame(None)], 4) == 0 == average_precision([], 4)


def test_a_frame_without_a_ball_is_infinitely_far_from_any():
    assert frame(None).error_px == float("inf") and frame((1.0, 2.0), (4.0, 6.0)).error_px == 5


def test_rates_of_one_kind_of_mistake_each():
    counts = dict.fromkeys(("TP", "FP1", "FP2", "FN", "TN"), 0)
    assert rates({**counts, "TN": 5}) == dict.fromkeys(
        ("precision", "recall", "recall_strict", "f1", "f1_strict"), 0.0
    ) | {"accuracy": 1.0}
    wanted = {  # of one hit beside one mistake
        "FP1": (1 / 2, 1, 1 / 2, 2 / 3, 1 / 2, 1 / 2),
        "FP2": (1 / 2, 1, 1, 2 / 3, 2 / 3, 1 / 2),
        "FN": (1, 1 / 2, 1 / 2, 2 / 3, 2 / 3, 1 / 2),
        "TN": (1, 1, 1, 1, 1, 1),
    }
    for kind, values in wanted.items():
        assert tuple(rates({**counts, "TP": 1, kind: 1}).values()) == pytest.approx(values), kind


def test_a_score_has_every_key_and_errors_of_found_balls_only():
    scores = score(RESULTS, 4, 0.5)
    assert list(scores) == [
        "num_frames",
        "tp",
        "fp1",
        "fp2",
        "fn",
        "tn",
        "precision",
        "recall",
        "recall_strict",
        "f1",
        "f1_strict",
        "accuracy",
        "ap",
        "mean_error_px",
        "median_error_px",
        "tolerance_px",
        "threshold",
        "per_visibility",
        "sweep",
        "events",
    ]
    assert (scores["num_frames"], scores["tolerance_px"], scores["threshold"]) == (5, 4, 0.5)
    assert scores["mean_error_px"] == pytest.approx(3.5) and scores["ap"] == average_precision(RESULTS, 4)
    assert scores["per_visibility"] == {
        "0": {"TP": 0, "FP1": 0, "FP2": 1, "FN": 0, "TN": 1},
        "1": {"TP": 1, "FP1": 1, "FP2": 0, "FN": 0, "TN": 0},
        "2": {"TP": 0, "FP1": 0, "FP2": 0, "FN": 1, "TN": 0},
    }
    assert scores["sweep"][4] == {"tolerance_px": 5, **rates(count(RESULTS, 5, 0.5))}
    assert scores["events"] is None


def test_the_mean_and_the_median_of_errors_are_not_confused():
    results = [frame((0.0, 0.0), (x, 0.0), confidence=0.5) for x in (1.0, 2.0, 6.0)]
    scores = score(results, 4, 0.5)
    assert scores["mean_error_px"] == 3 and scores["median_error_px"] == 2
    nothing = score([frame((0.0, 0.0), confidence=0.1), frame(None, confidence=0.9)], 4, 0.5)
    assert nothing["mean_error_px"] is None and nothing["median_error_px"] is None


@pytest.mark.parametrize(
    ("confidence", "found"),
    [
        ({0: 0.5, 1: 0.4}, [0]),  # the threshold itself is found
        ({0: 0.6, 2: 0.9}, [2]),  # within reach: the higher
        ({0: 0.6, 3: 0.9}, [0, 3]),
        ({0: 0.7, 1: 0.7, 2: 0.7, 3: 0.7}, [0, 3]),  # of equals the first
        ({5: 0.6, 3: 0.8, 1: 0.9}, [1, 5]),  # what was passed over keeps no other away
    ],
)
def test_an_event_is_the_most_confident_frame_within_reach(confidence, found):
    assert find_events(confidence, 0.5) == found
    assert find_events(confidence, 0.95) == []


def events(true, hits, bounces=None, clip="c"):
    """Frames of a clip with their labels, and how confident the model is of hits and bounces."""
    bounces = bounces or [0.0] * len(true)
    return [
        FrameResult(clip, Detection(i, (0.0, 0.0), 1.0, (h, b)), 1, (0.0, 0.0), t)
        for i, (t, h, b) in enumerate(zip(true, hits, bounces))
    ]


def test_events_are_matched_in_order_and_each_counts_once():
    true = [0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    hits = [0, 0, 0, 0.9, 0, 0, 0.9, 0, 0, 0, 0, 0]  # 3 is within reach of 1 and 4, 6 of 4 only
    bounces = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0.8, 0, 0]
    scores = score_events(events(true, hits, bounces))
    assert list(scores) == ["hit", "bounce"]
    assert scores["hit"] == {"tp": 2, "fp": 0, "fn": 1, "precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    assert scores["bounce"] == {"tp": 0, "fp": 1, "fn": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    one_too_many = score_events(events([0, 1, 0, 0, 1, 0, 0, 0, 0], [0, 0.9, 0, 0, 0.9, 0, 0, 0.9, 0]))["hit"]
    assert one_too_many == {"tp": 2, "fp": 1, "fn": 0, "precision": 2 / 3, "recall": 1.0, "f1": 0.8}


def test_events_of_one_clip_are_not_found_in_another():
    results = events([0, 1, 0], [0, 0, 0], clip="a") + events([0, 0, 0], [0, 0.9, 0], clip="b")
    assert score_events(results)["hit"] | {"f1": 0} == {"tp": 0, "fp": 1, "fn": 1, "precision": 0, "recall": 0, "f1": 0}
    both = events([2, 0], [0, 0], [0.5, 0], clip="a") + events([0, 0, 2], [0, 0, 0], [0.7, 0, 0], clip="b")
    assert score_events(both)["bounce"]["tp"] == 2  # at the threshold, and at the end of reach
    assert score_events(both, threshold=0.6)["bounce"]["tp"] == 1 == score_events(both, reach=1)["bounce"]["tp"]


def test_frames_whose_events_are_unknown_count_neither_way():
    known = events([1, 0, 0, 0, 0], [0.9, 0, 0, 0, 0])
    unlabeled = [FrameResult("c", Detection(7, (0.0, 0.0), 1.0, (0.9, 0.9)), 1, (0.0, 0.0))]
    unasked = [FrameResult("c", Detection(8, (0.0, 0.0), 1.0), 1, (0.0, 0.0), 1)]
    assert score_events(known + unlabeled + unasked) == score_events(known)
    assert score_events(unlabeled + unasked) is None
    assert score(known, 4, 0.5)["events"] == score_events(known)
