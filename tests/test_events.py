"""What is noted, who is told, and in which words."""

import logging

from test_judge import config_of

from autowu.events import EventLog, divergence_message, switch_message
from autowu.phases import Event, State, Switch
from autowu.ranks import Ranks


class SecondRank(Ranks):
    number = 1


def test_a_trouble_is_told_once_a_kind(caplog):
    log = EventLog(Ranks())
    for step in (3, 4):
        log.once("fit", step, "it failed")
        log.once("loss", step, "some were missing")
    assert log.events == [Event("fit", 3, "it failed"), Event("loss", 3, "some were missing")]
    assert caplog.messages == ["AutoWU, step 3: it failed", "AutoWU, step 3: some were missing"]


def test_what_befell_all_ranks_is_noted_by_all_and_told_by_the_first(caplog):
    caplog.set_level(logging.INFO, logger="autowu")
    logs = [EventLog(Ranks()), EventLog(SecondRank())]
    for log in logs:
        log.warn("divergence", 5, "it diverged")
        log.warn("divergence", 6, "it diverged")
        log.tell("switch", 4, "it switched")
        log.once("rank", 7, "its own trouble")
    assert logs[0].events == logs[1].events
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "AutoWU, step 5: it diverged"),
        ("WARNING", "AutoWU, step 6: it diverged"),
        ("INFO", "it switched"),
        ("WARNING", "AutoWU, step 7: its own trouble"),
        ("WARNING", "AutoWU, step 7: its own trouble"),
    ]


def test_events_are_saved_and_loaded():
    log, other = EventLog(Ranks()), EventLog(Ranks())
    log.tell("switch", 4, "it switched")
    other.load_state_dict(log.state_dict())
    assert other.events == log.events


def test_the_words_of_a_switch():
    by_test = Switch(40, 0.1, 0.987, 31.6, by_test=True)
    assert switch_message(config_of(), by_test, "", 28) == (
        "AutoWU switched at step 40 of 400: LR 0.1, the loss was lowest at step 32 (probability 0.987), "
        "model and optimizer are back at step 28"
    )
    at_limit = Switch(200, 0.1, 0.5, 199.0, by_test=False)
    assert switch_message(config_of(), at_limit, " (warm-up at its limit)", None).endswith("step 199 (warm-up at its limit)")
    blind = Switch(200, 0.1, None, None, by_test=False)
    assert switch_message(config_of(), blind, " (warm-up at its limit)", None).endswith(
        "no curve was fitted; LR from the optimizer's own"
    )


def test_the_words_of_a_divergence():
    state = State(switch=Switch(40, 0.1, 0.987, 31.6, by_test=True), setbacks=3, watched=False)
    assert divergence_message(state, 60) == (
        "training has diverged (3 of 3); the peak LR is now 0.0125, model and optimizer are back at step 60; "
        "from here on the run is left alone"
    )
