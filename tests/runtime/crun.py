"""What crun 1.8 does otherwise than the other two, by test: it isn't run with crun, and the matrix shows why."""

from __future__ import annotations

_WORDS = "errors in other words"
_CODE = "other exit codes"

_NO_CRIU = "Debian builds it without criu"

DIFFERENCES = {
    "test_recursive_attributes_reach_what_lies_below": "refuses or ignores rnoatime, rnodiratime, rnosymfollow",
    "test_symlinks_of_the_image_do_not_lead_out": "refuses a dangling symlink below a mount's target",
    "test_a_symlink_instead_of_proc_is_refused": _WORDS,
    "test_exec_takes_user_cwd_and_environment": "exec has no --additional-gids",
    "test_exec_says_what_it_could_not_run": _WORDS,
    "test_exec_in_a_stopped_container": _CODE,
    "test_tmpfs_options_and_copy_up": "a tmpfs doesn't take the mode of what is below",
    "test_cgroup_mounts": "the tmpfs around v1's hierarchies isn't read-only",
    "test_what_cannot_be_mounted_is_named": _WORDS,
    "test_each_hook_gets_the_state_in_order": "prestart hooks are told `created`",
    "test_start_container_runs_in_the_container": "startContainer hooks are told `starting`",
    "test_a_failing_hook_undoes_the_container": f"{_WORDS}, {_CODE}",
    "test_a_hook_past_its_timeout": _WORDS,
    "test_a_container_goes_through_its_states": _WORDS,
    "test_pause_and_resume": _CODE,
    "test_events_print_statistics": "no command events",
    "test_what_the_host_does_not_allow_is_an_error": _WORDS,
    "test_a_missing_program_is_named_by_create": _WORDS,
    "test_a_file_that_is_no_program": _WORDS,
    "test_create_sends_the_master_over_the_console_socket": "the terminal's name isn't sent with it",
    "test_run_in_the_foreground_of_a_terminal": "the caller's size isn't passed on",
    "test_a_detached_terminal_needs_a_socket": _WORDS,
    "test_a_bundle_without_a_configuration": _WORDS,
    "test_a_bad_id": "takes ids with blanks and other letters",
    "test_a_container_that_is_not_there": _WORDS,
    "test_an_unknown_signal": _WORDS,
    "test_the_log_is_what_containerd_reads": _WORDS,
    "test_spec_features_and_help": "no command features",
    "test_a_container_goes_on_where_it_was": _NO_CRIU,
    "test_it_is_restored_more_than_once": _NO_CRIU,
    "test_leave_running": _NO_CRIU,
    "test_memory_first": _NO_CRIU,
    "test_mounts_are_the_ones_of_the_host": _NO_CRIU,
    "test_a_joined_network_namespace_is_joined_again": _NO_CRIU,
    "test_a_terminal_is_handed_over_again": _NO_CRIU,
    "test_restore_in_the_foreground": _NO_CRIU,
    "test_a_restore_that_fails_leaves_nothing": _NO_CRIU,
    "test_only_a_running_container_is_written": _NO_CRIU,
    "test_a_host_without_it": "doesn't mind",
    "test_update_on_a_host_without_it": "update has no such flags",
}
