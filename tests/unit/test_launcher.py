"""Which environments count as workers of a launcher."""

from llamafactory_adaptive.launcher import launched_number, launched_processes


def test_what_a_cluster_sets_for_its_nodes_is_not_taken_for_a_launchers(monkeypatch):
    for key, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (launched_number(), launched_processes()) == (0, 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert (launched_number(), launched_processes()) == (1, 2)
