import pytest

from edgepress.targets.agent import machine


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A /sys of ours."""
    monkeypatch.setattr(machine, "_SYS", tmp_path)

    def write(**files):
        for name, value in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")

    return write


@pytest.fixture
def seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])
    return now


def test_without_sensors_nothing_is_measured(system):
    assert machine.Energy().source is None
    assert machine.Energy().joules() is None
    assert machine.celsius() is None
    assert machine.mhz() is None


def test_the_hottest_zone_and_the_fastest_core_count(system):
    system(class__thermal__thermal_zone0__temp=41000, class__thermal__thermal_zone1__temp=63500)
    system(**{f"devices__system__cpu__cpu{i}__cpufreq__scaling_cur_freq": khz for i, khz in enumerate((600000, 2400000))})
    system(class__thermal__thermal_zone2__temp="unknown")
    assert machine.celsius() == 63.5
    assert machine.mhz() == 2400.0


def test_a_counter_of_energy_may_run_over(system):
    place = "class__powercap__intel-rapl:0__"
    system(**{f"{place}energy_uj": 9_000_000, f"{place}max_energy_range_uj": 10_000_000})
    energy = machine.Energy()
    assert energy.source == "RAPL"
    system(**{f"{place}energy_uj": 9_500_000})
    assert energy.joules() == pytest.approx(0.5)
    system(**{f"{place}energy_uj": 250_000})
    assert energy.joules() == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("hwmon", {"class__hwmon__hwmon0__power1_input": 4_000_000}),
        ("battery", {"class__power_supply__BAT0__power_now": 4_000_000}),
        (
            "INA",
            {
                f"bus__i2c__drivers__ina3221__1-0040__hwmon__hwmon1__{k}": v
                for k, v in (("in1_input", 5000), ("curr1_input", 800))
            },
        ),
    ],
)
def test_a_sensor_of_power_is_added_up_over_time(system, seconds, source, files):
    system(**files)
    energy = machine.Energy()
    assert energy.source == source
    seconds[0] += 2.0
    assert energy.joules() == pytest.approx(8.0)
    seconds[0] += 1.0
    assert energy.joules() == pytest.approx(12.0)
