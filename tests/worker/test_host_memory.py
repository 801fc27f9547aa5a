"""Free memory: the machine's, or the container's where that is less."""

from quire.worker.host_memory import free_bytes


def test_the_smaller_of_machine_and_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemFree:        10 kB\nMemAvailable:   50 kB\n")
    assert free_bytes(meminfo, tmp_path / "none") == 50 * 1024
    for limit, used, want in (("max", 0, 50 * 1024), ("30000", 10000, 20000), ("10000", 20000, 0), ("999999", 0, 50 * 1024)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(str(used))
        assert free_bytes(meminfo, tmp_path) == want


def test_the_older_kind_of_container(tmp_path):
    meminfo, group = tmp_path / "meminfo", tmp_path / "memory"
    meminfo.write_text("MemAvailable:   50 kB\n")
    group.mkdir()
    for limit, used, want in (("30000", 10000, 20000), (str(2**63 - 4096), 10000, 50 * 1024)):
        (group / "memory.limit_in_bytes").write_text(limit)
        (group / "memory.usage_in_bytes").write_text(str(used))
        assert free_bytes(meminfo, tmp_path) == want


def test_this_machine_has_some():
    assert free_bytes() > 0
