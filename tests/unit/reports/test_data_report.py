"""What is told of training data, against figures worked out from the samples one by one."""

import json

import numpy as np
import pytest
import torch

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import read_lines
from llamafactory_adaptive.reports import data_report
from llamafactory_adaptive.reports.data_report import (
    DATA_PLOT_FILE,
    DATA_REPORT_FILE,
    SAMPLES_FILE,
    DataQuality,
    data_report_of,
    data_table,
    read_data_report,
    run_identity,
    save_data_report,
)
from tests.helpers.plans import make_plan


N = 24
QUALITY = [((7 * i) % N) / 4 - 2 for i in range(N)]  # all different
USAGE = [i % 4 for i in range(N)]
DIGESTS = [f"{i:064d}" for i in range(N)]
for original, copy in ((3, 9), (3, 11), (5, 20)):
    DIGESTS[copy] = DIGESTS[original]


def quality(**more):
    loss = torch.arange(N, dtype=torch.float64) / 10
    known = {
        "terms": {"loss": loss, "gradient_norm": loss.square() + 1},
        "quality_N": torch.tensor(QUALITY, dtype=torch.float64),
        "probability_N": torch.softmax(torch.tensor(QUALITY, dtype=torch.float64), 0),
        "kept_N": torch.tensor([i not in (2, 17) for i in range(N)]),
        "usage_N": torch.tensor(USAGE),
        "row_digests": DIGESTS,
        "subset_size": 12,
        "effective_size": 7.25,
    }
    return DataQuality(**{**known, **more})


def text(index):
    return f"question {index}", f"answer {index}" + "!" * 3000


@pytest.fixture
def output(tmp_path):
    save_data_report(tmp_path, make_plan(), quality(), 9, text)
    return tmp_path


def test_the_summary_counts_every_sample(output):
    report = read_data_report(output)
    expected = {"samples": N, "clipped": 2, "subset_size": 12, "steps": 9, "samples_used": 18, "most_used": 3}
    assert {key: report[key] for key in expected} == expected
    assert report["share_used"] == 0.75
    assert report["without_loss_tokens"] == 1, "the sample with a loss of exactly 0"
    assert report["duplicates"] == {"groups": 2, "samples": 5, "largest": [[3, 9, 11], [5, 20]]}
    for name, values in (("quality", QUALITY), ("loss", np.arange(N) / 10)):
        assert list(report["distribution"][name].values()) == pytest.approx(
            list(np.quantile(values, [0, 0.05, 0.5, 0.95, 1]))
        )


def test_best_and_worst_samples_are_those_of_the_quality_order(output):
    report = read_data_report(output)
    order = sorted(range(N), key=lambda index: QUALITY[index])
    assert [sample["index"] for sample in report["worst"]] == order[:10]
    assert [sample["index"] for sample in report["best"]] == order[::-1][:10]
    first = report["best"][0]
    assert first["prompt"] == f"question {first['index']}"
    assert len(first["answer"]) == 2000, "long texts are cut"


def test_every_sample_has_a_line_and_copies_name_the_first(output):
    lines = [json.loads(line) for line in read_lines(output / SAMPLES_FILE)]
    assert [line["index"] for line in lines] == list(range(N))
    assert [line["used"] for line in lines] == USAGE
    assert [line["index"] for line in lines if line["clipped"]] == [2, 17]
    assert {line["index"]: line["duplicate_of"] for line in lines if "duplicate_of" in line} == {9: 3, 11: 3, 20: 5}
    assert sum(line["probability"] for line in lines) == pytest.approx(1.0)


def test_texts_are_left_out_where_none_may_be_shown(tmp_path):
    save_data_report(tmp_path, make_plan(), quality(), 9, None)
    assert "question" not in (tmp_path / DATA_REPORT_FILE).read_text()
    assert "push_to_hub" in data_table(read_data_report(tmp_path))


def test_the_picture_shows_every_sample_once_and_what_was_used_and_clipped(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(data_report, "save_figure", lambda figure, path: kept.append((figure, path)))
    outlier = [*QUALITY[:-1], 1e6]
    save_data_report(tmp_path, make_plan(), quality(quality_N=torch.tensor(outlier, dtype=torch.float64)), 9, text)
    ((figure, path),) = kept
    assert path.name == DATA_PLOT_FILE
    left, right, _ = figure.axes
    labels = [each.get_text() for each in left.get_legend().get_texts()]
    assert labels == ["all samples", "used so far", "clipped"]
    heights = [bar.get_height() for bar in left.patches if hasattr(bar, "get_height")]
    assert sum(heights[:40]) == N, "what lies beyond stands in the last bar"
    assert (heights[39], sum(heights[40:])) == (1, 2), "the outlier; what was clipped"
    dots = right.collections[0]
    assert dots.get_offsets().data.tolist() == [[i / 10, pytest.approx((i / 10) ** 2 + 1)] for i in range(N)]
    assert dots.get_array().tolist() == USAGE


def test_the_picture_of_an_unused_whole_pool_says_no_more_than_that(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(data_report, "save_figure", lambda figure, path: kept.append(figure))
    unused_pool = quality(usage_N=torch.zeros(N, dtype=torch.int64), kept_N=torch.ones(N, dtype=torch.bool))
    save_data_report(tmp_path, make_plan(), unused_pool, 0, text)
    assert [each.get_text() for each in kept[0].axes[0].get_legend().get_texts()] == ["all samples"]


def test_the_table_tells_the_summary(output):
    said = data_table(read_data_report(output))
    for words in (
        "24 (2 clipped, 1 without a token that takes loss)",
        "12; weights amount to 7.2 equally likely samples",
        "used in 9 steps       18 samples, 75.0% of all; at most 3 times",
        "5 samples in 2 groups",
        "equal: 3, 9, 11",
        "used 3 times",
    ):
        assert words in said
    (distribution,) = [line.split() for line in said.splitlines() if line.split()[:1] == ["quality"]]
    assert distribution[1:] == ["-2", "-1.712", "0.875", "3.462", "3.75"]
    assert max(map(len, said.splitlines())) < 200, "long texts are cut"


def clustered(**more):
    return quality(cluster_N=torch.tensor([i % 3 for i in range(N)]), min_cluster_share=0.5, scorings=3, **more)


def test_every_cluster_is_told_with_its_shares(tmp_path):
    """Against sums over the samples one by one; clipped samples (2, 17, both of cluster 2) count nowhere."""
    p = np.where(np.isin(np.arange(N), (2, 17)), 0.0, np.exp(QUALITY))
    p /= p.sum()
    save_data_report(tmp_path, make_plan(), clustered(probability_N=torch.tensor(p)), 9, None)
    report = read_data_report(tmp_path)
    for cluster, line in enumerate(report["clusters"]):
        mine = [i for i in range(N) if i % 3 == cluster and i not in (2, 17)]
        assert line["cluster"] == cluster
        assert line["samples"] == len(mine) == (6 if cluster == 2 else 8)
        assert line["share_of_samples"] == pytest.approx(len(mine) / (N - 2))
        assert line["share_of_probability"] == pytest.approx(p[mine].sum())
        assert line["share_of_draws"] == pytest.approx(sum(USAGE[i] for i in mine) / sum(USAGE))
        within = p[mine] / p[mine].sum()
        assert line["effective_sample_size"] == pytest.approx(1.0 / (within**2).sum())
    lines = [json.loads(line) for line in read_lines(tmp_path / SAMPLES_FILE)]
    assert [line["cluster"] for line in lines] == [i % 3 for i in range(N)]
    said = data_table(report)
    assert "clusters of samples by the direction of their gradients, each held at 50% of its share" in said
    assert "likely samples; samples were scored 3 times" in said


def test_without_clusters_none_are_told_and_reports_of_older_versions_have_none(output):
    report = read_data_report(output)
    assert report["clusters"] == []
    assert "clusters" not in data_table(report)
    older = {key: value for key, value in report.items() if key not in ("clusters", "min_cluster_share", "scorings")}
    assert data_table(older) == data_table(report)


def test_a_run_knows_its_own_report_whatever_its_ranks(output):
    assert data_report_of(output, make_plan((4, 4)))["samples"] == N
    assert run_identity(make_plan()) == run_identity(make_plan((4, 4)))
    for other in ({"lora_rank": 8}, {"method": "random"}, {"provenance": {"seed": 2}}, {"options": {}}):
        assert data_report_of(output, make_plan(**other)) is None
    assert data_report_of(output / "none", make_plan()) is None


def test_a_report_of_an_older_version_without_identity_counts(output):
    path = output / DATA_REPORT_FILE
    document = json.loads(path.read_text())
    del document["run"]
    path.write_text(json.dumps(document))
    assert data_report_of(output, make_plan(lora_rank=8))["samples"] == N
    path.write_text(json.dumps({**document, "schema_version": 2}))
    with pytest.raises(PlanError, match="is no data report of schema 1"):
        read_data_report(output)
