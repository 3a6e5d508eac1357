"""Faults in what is charged: ledger, leases, filter, budget of a data set, signatures."""

from __future__ import annotations

from tests.privacy.mutants import Mutant

DISK = "tests/engine_host/test_ledger_disk.py::"
MECHANISMS = "tests/engine_host/test_ledger_mechanisms.py::"
ADAPTIVE = "tests/engine_host/test_ledger_adaptive.py::"
BUDGET = "tests/engine_host/test_dataset_budget.py::"
RULES = "tests/engine_host/test_ledger_rules.py::"
LEDGER = "tests/privacy/test_ledger.py::"
FIT = "tests/privacy/test_fit_ledger.py::"
SESSION = "tests/engine/test_session_ledger.py::"

LEDGERS = [
    Mutant(
        "a line is not flushed before what it pays for",
        "engine/chain.py",
        "        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n    os.fsync(descriptor)\n",
        "        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n",
        (DISK + "test_a_power_cut_at_any_moment_loses_nothing_that_was_released",),
    ),
    Mutant(
        "half a line stays after a full disk",
        "engine/chain.py",
        "            self._cut(end)\n",
        "",
        (RULES + "test_a_full_disk_charges_nothing_and_leaves_a_whole_ledger",),
    ),
    Mutant(
        "lines are not bound to the one before",
        "engine/chain.py",
        'line["seq"] != len(self.lines) or line["prev"] != prev',
        'line["seq"] < 0',
        (LEDGER + "test_lines_cannot_be_removed_or_moved[delete]",),
    ),
    Mutant(
        "what was written is not held against its hash",
        "engine/chain.py",
        'if line["hash"] != self._digest(',
        "if not self._digest(",
        (LEDGER + "test_no_edited_byte_goes_unseen", BUDGET + "test_each_changed_byte_is_noticed"),
    ),
    Mutant(
        "an open lease is charged by the steps that were taken back",
        "engine/ledger.py",
        "used=max(used_steps, self._taken[part])",
        "used=used_steps",
        (RULES + "test_steps_that_passed_stay_charged_whatever_the_closing_call_says",),
    ),
    Mutant(
        "a lease pays for a step twice",
        "engine/ledger.py",
        "        self._taken[part] = at + 1\n",
        "",
        (RULES + "test_a_lease_pays_for_a_step_once",),
    ),
    Mutant(
        "the first step of a lease may be taken again",
        "python/synthward/privacy_engine.py",
        "            self.ledger.covers(step, event, part=lease.part)\n",
        "",
        (SESSION + "test_a_checkpoint_older_than_its_lease_costs_its_steps_again",),
    ),
    Mutant(
        "one mechanism goes on over a change of key",
        "engine/charges.py",
        '        elif kind == "key":\n            _end_rows(parts, line)\n',
        "",
        (MECHANISMS + "test_a_new_key_begins_another_mechanism",),
    ),
    Mutant(
        "leases of one mechanism are charged one by one",
        "engine/charges.py",
        "if before is not None and event.is_one_mechanism and before.event == event:",
        "if False:",
        (MECHANISMS + "test_leases_in_a_row_are_one_mechanism",),
    ),
    Mutant(
        "one mechanism may be torn apart under its key",
        "engine/charges.py",
        "if not goes_on or mark",
        "if mark",
        (MECHANISMS + "test_steps_that_do_not_follow_need_a_fresh_key",),
    ),
    Mutant(
        "a torn lease counts as one step",
        "engine/charges.py",
        "int(found.group(1)) if found else longest",
        "1",
        (RULES + "test_a_torn_lease_is_charged_whole",),
    ),
    Mutant(
        "noise may change during a run without the filter",
        "engine/ledger.py",
        '        if first is not None and event_from_dict(first["event"]) != event:\n',
        "        if False:\n",
        (MECHANISMS + "test_parameters_that_change_during_a_run_are_refused_by_name",),
    ),
    Mutant(
        "an adaptive ledger by the sum of another accountant",
        "engine/ledger.py",
        "        if self._filter is None:\n",
        "        if True:\n",
        (ADAPTIVE + "test_parameters_may_change_and_the_filter_accounts",),
    ),
    Mutant(
        "the target is not looked at",
        "engine/ledger.py",
        "        if target is None:\n            return\n        after",
        "        if True:\n            return\n        after",
        (LEDGER + "test_a_lease_beyond_the_target_is_refused_and_not_written",),
    ),
    Mutant(
        "reservations do not count",
        "engine/budget.py",
        "[event for entry in entries for event in entry.events]",
        '[event for entry in entries if entry.state == "settled" for event in entry.events]',
        (BUDGET + "test_a_run_counts_whole_until_it_settles",),
    ),
    Mutant(
        "a run that has started can be cancelled",
        "engine/budget.py",
        '"cancel": {"reserved"},',
        '"cancel": {"reserved", "started", "settled"},',
        (BUDGET + "test_what_was_never_started_can_be_given_back_and_nothing_else",),
    ),
    Mutant(
        "an older ledger put back goes unseen",
        "python/synthward/run/training.py",
        "if not isinstance(head, str) or not self.ledger.holds(head):",
        "if False:",
        (FIT + "test_a_resumed_run_needs_the_ledger_that_its_checkpoint_names",),
    ),
]
