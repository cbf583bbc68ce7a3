"Long tests with real servers and processes run where CXR_SLOW is set: `make test-all`."
import os
from pathlib import Path

import pytest

LONG = {"test_space_starts_in_an_empty_environment", "test_dcmtk_sends_and_receives", "test_orthanc_gets_its_reports_back", "test_no_panel_is_empty",
        "test_a_service_that_dies_is_told_at_the_webhook", "test_drift_is_silent_until_the_films_change", "test_simulated_traffic_survives_a_killed_service",
        "test_real_readers_are_exchanged_under_traffic_and_a_slow_one_goes_back", "test_a_backup_goes_back_into_either_database",
        "test_a_good_canary_reads_all_films_and_a_bad_one_goes_back", "test_an_operator_goes_to_production_and_back_with_these_files", "test_a_month_of_toys_with_real_readers"}


FIRST = ("test_dvc", "test_cli", "test_train", "test_deploy", "test_etl_restart", "test_evaluate")   # minutes each: begun last, one of two workers would wait for the other
ALONE = ("test_benchmarks", "test_notebooks")   # tests that share nothing and may go to any worker; other files stay together


@pytest.hookimpl(optionalhook=True)   # loadgroup would do it, but pytest 9.2 does not let it name the groups
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling
    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return nodeid if Path(file).stem in ALONE else file
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda i: FIRST.index(i.path.stem) if i.path.stem in FIRST else len(FIRST) + (i.path.stem in ALONE))
    if os.environ.get("CXR_SLOW"): return
    for item in items:
        if getattr(item, "originalname", item.name) in LONG: item.add_marker(pytest.mark.skip(reason="long, with real servers: make test-all"))
