"""The rows of the bench: what is promised, when it counts as kept, and the tests and sweeps that show it.

A test whose name begins with ``test_<id>_`` belongs to the row of that id, wherever it stands; ``tests`` names others.
A sweep is a function of :mod:`tests.bench.sweeps` that yields many cases of one kind.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["ROWS", "TESTS", "Row", "functions", "nodes_of"]

TESTS = Path(__file__).resolve().parents[1]
_SKIPPED = {"__pycache__", "zoo"}


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        tests: others than those named for it, ``file::function`` with blanks between: ``chat::x`` is ``test_x`` of
            ``unit/test_chat.py``, ``native/tap_native::x`` that of ``native/test_tap_native.py``.
        sweeps: names of functions of :mod:`tests.bench.sweeps`.
    """

    id: str
    what: str
    passes: str
    tests: str = ""
    sweeps: tuple[str, ...] = ()


ROWS = (
    # model files
    Row(
        "R1",
        "model and projector cut short at 64 places and at each boundary",
        "exit 3, one line with file and reason, under 2 s, worker unharmed",
        "gguf_header::cut_short_anywhere",
        sweeps=("truncations",),
    ),
    Row(
        "R2",
        "every key of a header set to extremes, to another type, to texts of 0 B and 1 MB",
        "the command line outlives all; a refusal, or a death that is told with llama.cpp's last words",
        "gguf_header::values_that_would_end_llama_cpp_are_named",
        sweeps=("keys",),
    ),
    Row(
        "R3",
        "files damaged at random: 10,000 by their seeds, and those that once ended the worker",
        "no traceback, hang or orphan; those known are refused",
        "engine_damage::damaged_files_end_in_a_sentence gguf_header::changed_bytes_are_read_or_refused",
        sweeps=("damaged_files", "known_damage"),
    ),
    Row(
        "R4",
        "wrong projector, swapped files, audio alone, a model without one",
        "exit 3; both widths, or which flag it belongs to",
        "gguf_header::roles gguf_header::widths_that_differ_are_both_named "
        "engine_answers::unusable_files_are_named cli_ask::missing_model_files",
    ),
    Row(
        "R5",
        "weights that are no numbers, and files that rotted",
        "`show --verify` names the tensor and the check sum",
        "cli_models::verify_tells_damaged_files cli_models::verify_tells_weights_that_are_no_numbers",
    ),
    Row(
        "R6",
        "43 bytes that ask for an exabyte",
        "refused in under 100 ms and 20 MB",
        "gguf_header::43_bytes_that_ask_for_an_exabyte "
        "gguf_header::absurd_headers_are_refused_before_they_cost_anything "
        "gguf_header::many_small_arrays_are_bounded_together",
    ),
    Row(
        "R7",
        "chat templates that reach out, loop, flood or fail",
        "exit 3, bounded time and memory, no file touched",
        "chat::templates_cannot_escape_or_fail_otherwise chat::output_bombs_are_refused_soon "
        "chat::templates_that_lose_or_repeat_something_are_refused "
        "engine_answers::templates_that_never_end_cost_their_time_limit_alone",
    ),
    Row(
        "R8",
        "the worker killed at 20 points, by three signals, below the chat too",
        "told within a second; the retry answers the same; history intact",
        "engine_kills::a_killed_worker_is_told_and_replaced engine_worker::a_worker_killed_between_calls "
        "engine_worker::a_worker_killed_in_a_call session_engine::a_worker_that_died_is_replaced "
        "tui/conversation::an_engine_that_dies_at_any_step_loses_nothing "
        "tui/chat::an_engine_that_dies_is_told_started_again_and_nothing_is_lost",
        sweeps=("kills",),
    ),
    # pictures
    Row(
        "I1",
        "eight EXIF orientations of one scene",
        "the same pixels",
    ),
    Row(
        "I2",
        "60,000 x 60,000 and 16,384 x 16,384 in some bytes",
        "exit 6 in under 100 ms and 50 MB",
    ),
    Row(
        "I3",
        "89 megapixels in 260 KB; a photo of 24 megapixels",
        "refused; taken in under 400 MB",
    ),
    Row(
        "I4",
        "bombs in text chunks, 10 MB of EXIF, garbage for a profile",
        "taken without it or exit 6, under 1 s",
    ),
    Row(
        "I5",
        "16 bits, floats, palettes, transparency, four inks, Lab",
        "as expected within 1 (2 where JPEG rounds)",
    ),
    Row(
        "I6",
        "animations of 1 and 10,000 frames",
        "frame 1 of N, and said; under 200 ms",
    ),
    Row(
        "I7",
        "pictures cut short and damaged",
        "exit 6 and 'truncated', never half a picture",
    ),
    Row(
        "I8",
        "EPS, PDF, PSD, SVG and TIFF named .png",
        "exit 6, no program started",
    ),
    Row(
        "I9",
        "pipes, devices, folders, loops, names that drive terminals",
        "exit 6 in under 1 s, names escaped",
    ),
    Row(
        "I10",
        "1 x 1, 1 x 65,535, 65,535 x 1",
        "a token at least, or a refusal; worker alive",
    ),
    Row(
        "I11",
        "the same pixels with hostile metadata and names",
        "the same prompt ids and answer",
    ),
    # prompts
    Row(
        "P1",
        "every special token of a vocabulary as a user's text, alone and within words",
        "none of its control tokens; the text comes back from its tokens",
        "engine_answers::what_users_write_is_never_a_control_token chat::what_users_write_is_never_special",
        sweeps=("specials",),
    ),
    Row(
        "P2",
        "media markers and roles as text, ten markers beside one picture",
        "as many pictures as there are; texts verbatim",
        "chat::any_text_comes_through_unchanged chat::roles_pictures_and_texts_keep_their_order",
        sweeps=("markers",),
    ),
    Row(
        "P3",
        "the same as an answer of the model, and out of the history",
        "the same",
        sweeps=("retold",),
    ),
    # terminals
    Row(
        "T1",
        "sequences that drive terminals, in every place where text is shown",
        "none reaches the terminal",
        "sanitize::attacks_leave_nothing sanitize::no_control_character_gets_through "
        "cli_ask::an_answer_cannot_drive_the_terminal cli_ask::errors_with_hostile_text_are_one_safe_line "
        "cli_models::a_name_that_drives_terminals_is_shown_safely "
        "tui/hostile::no_attack_reaches_the_terminal tui/hostile::no_part_of_an_attack_is_a_sequence",
    ),
    Row(
        "T2",
        "the same, cut at every place between two chunks",
        "none reaches the terminal",
        "sanitize::attacks_split_at_every_place_leave_nothing sanitize::chunks_do_not_matter "
        "tui/hostile::what_is_shown_does_not_depend_on_the_pieces",
    ),
    Row(
        "T3",
        "markup, lines of 1 MB, lone surrogates, 10,000 joiners",
        "shown as they are",
        "sanitize::scripts_and_emoji_are_left_alone sanitize::an_open_sequence_cannot_swallow_the_answer "
        "tui/hostile::markup_is_text tui/hostile::odd_answers_are_shown_and_kept_whole "
        "tui/hostile::runs_without_a_width_are_bounded",
    ),
    # cancelling
    Row(
        "C1",
        "Ctrl-C at 50 random times from the first line of Python to the end",
        "exit 130 within a second (two where others hold the machine), no traceback, what was said kept",
        "cli_process::ctrl_c_keeps_what_was_printed_and_exits_130 "
        "cli_process::ctrl_c_where_the_engine_does_not_listen_still_exits_within_a_second "
        "cli_process::a_second_ctrl_c_leaves_at_once engine_worker::cancel_in_the_tower_and_in_a_prefill "
        "session::a_cancelled_question_leaves_no_turn "
        "tui/conversation::a_question_can_be_stopped_and_the_next_one_asked",
        sweeps=("ctrl_c",),
    ),
    Row(
        "C2",
        "cancelled, then asked; held against a process that was not",
        "token ids identical",
        "engine_worker::cancel_in_a_long_answer_leaves_the_next_unchanged "
        "reuse::a_cancelled_prefill_is_gone_on_from staged::a_cancel_leaves_nothing_behind "
        "pauses::a_cancel_leaves_nothing_behind",
    ),
    # downloads
    Row(
        "D1",
        "a pull killed at 10 points, and run again",
        "resumed, at most 1 MiB twice, hash right, whole files alone are visible",
        "pulls::a_killed_pull_goes_on_where_it_was hub::a_part_of_an_earlier_process_is_gone_on_with",
    ),
    Row(
        "D2",
        "another file meanwhile, ranges ignored, wrong lengths, a byte turned",
        "begun anew, begun anew, exit 7, exit 7 and removed",
        "hub::a_file_that_changed_meanwhile_is_begun_anew hub::a_server_that_ignores_ranges_sends_all_again "
        "hub::wrong_lengths hub::a_tampered_byte_is_refused_and_removed "
        "hub::a_part_that_rotted_on_disk_is_refused_and_removed",
    ),
    Row(
        "D3",
        "a disk of 10 MB for 20 MB; a quota met midway",
        "refused beforehand with both sizes; exit 8 and the part kept",
        "pulls::a_disk_that_is_too_small pulls::a_quota_that_is_met_midway "
        "hub::too_little_room_is_said_beforehand hub::a_disk_that_fills_up_keeps_the_part",
    ),
    Row(
        "D4",
        "two pulls at once; names that lead elsewhere",
        "fetched once, both succeed; refused",
        "pulls::two_at_once_do_the_work_once hub::two_at_once_do_the_work_once "
        "hub::names_that_lead_elsewhere_are_refused",
    ),
    # history
    Row(
        "B1",
        "8 processes write 200 turns each into one history",
        "1,600 rows, none locked out, file sound",
        "history_reliability::processes_add_turns_at_once",
    ),
    Row(
        "B2",
        "8 first runs on an old schema; one from the future",
        "migrated once; refused and left as it is",
        "history_reliability::first_runs_bring_a_file_up_to_date_once "
        "history_reliability::a_step_that_fails_leaves_the_old_file "
        "history_reliability::a_file_from_the_future_is_left_as_it_is "
        "history_reliability::a_journal_from_the_future_is_left_as_it_is",
    ),
    Row(
        "B3",
        "killed while writing, 200 times; disk full; home read-only",
        "sound, last turn there; answered with a warning",
        "history_reliability::a_killed_writer_leaves_whole_turns "
        "history_reliability::a_full_disk_is_told_and_what_was_there_stays "
        "history_reliability::a_quota_is_told_and_what_was_there_stays "
        "history_reliability::a_home_that_cannot_be_written_is_told "
        "tui/chat::a_history_that_cannot_be_written_is_told_and_the_answer_stays",
    ),
    # offline
    Row(
        "O1",
        "asked without any network",
        "the same answer",
        "private::answers_are_the_same_without_a_network",
    ),
    Row(
        "O2",
        "system calls of every command",
        "no internet socket, no program but Python's own worker",
        "private::no_system_call_reaches_the_network isolation::from_inside_nothing_leads_out "
        "isolation::from_inside_no_other_process_is_got_at "
        "isolation::the_worker_is_closed_before_it_opens_a_file isolation::the_decoder_apart_is_closed "
        "private::no_system_call_of_the_chat_reaches_the_network",
    ),
    Row(
        "O3",
        "hooks on sockets and programs in commands and in all tests",
        "they raise; pull's tests alone lift them",
        "private::no_command_calls_the_network_or_a_program private::the_hook_would_have_told",
    ),
    # memory
    Row(
        "M1",
        "memory predicted and taken, six shapes",
        "within 10 %, never under by more than 3 %",
        "memory::predictions_hold",
        sweeps=("memory",),
    ),
    Row(
        "M2",
        "half of the memory that is needed",
        "refused before loading, exit 5, with the parts and what would fit",
        "memory::what_cannot_fit_is_refused_with_what_does "
        "memory::limits_of_the_worker_and_of_processes_bound_the_room",
        sweeps=("half_memory",),
    ),
    Row(
        "M3",
        "picture and question beyond the context",
        "refused before encoding, both numbers",
        "pipeline::a_question_too_long_for_the_context_is_refused_before_encoding "
        "engine_answers::prompts_beyond_the_context_name_both_numbers "
        "cli_ask::question_too_long_for_the_context",
    ),
    # native
    Row(
        "N1",
        "libraries mapped after a tapped answer",
        "one file a family",
    ),
    Row(
        "N2",
        "the tap without llama.cpp, or with another",
        "an error that names both versions; answers go on without it",
        "native/tap_native::alone_it_is_refused native/tap_native::guard_names_both_versions packaging::native_library",
    ),
    Row(
        "N3",
        "the tap under sanitizers, 10,000 of them, fuzzed",
        "no report, under 1 MB more",
        "native/tap_native::agrees_with_a_plain_softmax native/tap_native::clean_under_sanitizers",
    ),
    Row(
        "N4",
        "the tap on and off",
        "token ids identical, logits equal",
        "engine_answers::the_tap_changes_no_token gpu::looking_changes_nothing",
    ),
    Row(
        "N5",
        "more rows attended to than the tap has room for",
        "refused with what is wrong; nothing is dropped in silence",
    ),
    # what people rely on
    Row(
        "A1",
        "determinism: runs, caches, cancels, sessions, threads said",
        "token ids identical",
        "engine_answers::the_same_question_has_the_same_answer engine_answers::sampling_follows_its_seed "
        "image_cache::a_picture_that_was_kept_is_not_encoded_again "
        "reuse::leading_batches_are_reused_bit_for_bit session_engine::a_draft_changes_no_turn",
    ),
    Row(
        "A2",
        "one session of many questions about changing pictures",
        "memory flat, nothing leaked, answers as at the start",
        "engine_worker::nothing_is_left_of_twenty_engines "
        "engine_worker::loading_and_closing_again_and_again_needs_no_more_memory",
        sweeps=("long",),
    ),
    Row(
        "A3",
        "the 1st, 2nd, 3rd ... write, allocation and message fails, until none does",
        "no traceback, the right exit code, no half file under its name, the next run works",
        "history_reliability::whichever_write_fails_turns_are_whole "
        "history_reliability::a_write_that_fails_leaves_whole_turns",
        sweeps=("faults",),
    ),
    Row(
        "A4",
        "fuzzing of all that reads what others wrote",
        "nothing but what is documented",
        sweeps=("fuzz",),
    ),
    Row(
        "A5",
        "what is left on disk of a question, and of --private",
        "nothing but what is said; nothing",
        "private::nothing_tells_of_a_question private::private_leaves_nothing_at_all tui/chat::private_writes_nothing",
    ),
)


@cache
def functions() -> dict[str, tuple[str, ...]]:
    """Names of the tests of every test file, by its path below ``tests/``; read, not imported."""
    found = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        if not _SKIPPED & set(path.relative_to(TESTS).parts):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = (n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            found[path.relative_to(TESTS).as_posix()] = tuple(n for n in names if n.startswith("test_"))
    return found


def nodes_of(row: Row) -> list[str]:
    """All tests of a row: those that it names, and those that are named for it."""
    return list(dict.fromkeys([*map(_node, row.tests.split()), *_named_for(row.id)]))


def _node(short: str) -> str:
    path, _, name = short.partition("::")
    folder, _, file = path.rpartition("/")
    return f"{folder or 'unit'}/test_{file}.py::test_{name}"


def _named_for(row_id: str) -> Iterator[str]:
    pattern = re.compile(rf"test_{row_id.lower()}_")
    for path, names in functions().items():
        yield from (f"{path}::{name}" for name in names if pattern.match(name))
