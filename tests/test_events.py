"""What is noted, who is told, and in which words."""

import logging
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
from test_judge import config_of

from autowu.events import EventLog, back_at, divergence_message, switch_message
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
        "from here on only a loss that explodes lowers it"
    )
    assert divergence_message(state, None) == (
        "training has diverged (3 of 3); the peak LR is now 0.0125; from here on the run is left alone"
    )
    assert divergence_message(replace(state, setbacks=5), None).endswith("left alone")
    assert "(4 of 10)" in divergence_message(replace(state, setbacks=4), 60)
    assert divergence_message(replace(state, setbacks=10), 60).endswith("step 60; from here on the run is left alone")


@contextmanager
def no_logging():
    """As in a plain script: no handler in reach, those of pytest neither, and no level set."""
    logger = logging.getLogger("autowu")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("handlers", []), ("filters", []), ("propagate", False)):
            patch.setattr(logger, name, value)
        logger.setLevel(logging.NOTSET)
        yield logger
    logging.disable(logging.NOTSET)
    logger.setLevel(level)


def told(ranks=None):
    log = EventLog(ranks or Ranks())
    log.say("what the copies take")
    log.tell("switch", 4, "it switched")
    log.warn("divergence", 5, "it diverged")


def test_who_has_set_up_no_logging_hears_switch_and_setbacks_once_and_no_more(capsys):
    with no_logging():
        told()
        told(SecondRank())
    assert capsys.readouterr() == ("", "it switched\nAutoWU, step 5: it diverged\n")


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.WARNING])
def test_who_has_set_up_logging_hears_what_was_asked_for_and_nothing_twice(level, capsys):
    with no_logging() as logger:
        logger.addHandler(logging.StreamHandler(sys.stdout))
        logger.setLevel(level)
        told()
    heard = capsys.readouterr()
    assert heard.err == ""
    assert heard.out.splitlines() == [
        *(["what the copies take", "it switched"] * (level <= logging.INFO)),
        "AutoWU, step 5: it diverged",
    ]


@pytest.mark.parametrize(
    ("off", "heard"),
    [
        (lambda logger: logger.setLevel(logging.WARNING), "AutoWU, step 5: it diverged\n"),
        (lambda logger: logger.setLevel(logging.ERROR), ""),
        (lambda logger: logger.addHandler(logging.NullHandler()), ""),
        (lambda logger: logging.disable(logging.INFO), "AutoWU, step 5: it diverged\n"),
        (lambda logger: logging.disable(), ""),
        (lambda logger: logger.addFilter(lambda record: False), ""),
    ],
    ids=["level WARNING", "level ERROR", "NullHandler", "disable INFO", "disable", "filter"],
)
def test_it_is_turned_off_as_logging_turns_things_off(off, heard, capsys):
    with no_logging() as logger:
        off(logger)
        told()
    assert capsys.readouterr() == ("", heard)


def test_without_a_last_resort_nothing_is_said_where_nobody_listens(capsys, monkeypatch):
    monkeypatch.setattr(logging, "lastResort", None)
    with no_logging():
        EventLog(Ranks()).tell("switch", 4, "it switched")
    assert capsys.readouterr() == ("", "")


def test_the_copy_that_was_put_back_is_read_from_the_words_of_an_event():
    switch, state = Switch(40, 0.1, 0.987, 31.6, by_test=True), State(switch=Switch(40, 0.1, 0.987, 31.6, by_test=True), setbacks=1)
    for to in (None, 0, 28, 30):
        assert back_at(Event("switch", 40, switch_message(config_of(), switch, "", to))) == to
        assert back_at(Event("divergence", 60, divergence_message(state, to))) == to
