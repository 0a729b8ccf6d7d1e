"""`keys add|list|revoke`: the command that keeps the file of keys."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.gateway.access.key_file import KeySet, exclusive, read_keys, write_keys
from wicore_backend.gateway.access.keys import ServiceClass, new_key


def keys_command(arguments: Sequence[str]) -> int:
    """Run it: 0, or 2 for what was wrong."""
    return _run(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wicore_backend.gateway keys", description="API keys. A running gateway notices changes by itself."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="make a key; it is shown once, and only its hash is kept")
    revoke = actions.add_parser("revoke", help="end a key; its running requests go on")
    listing = actions.add_parser("list", help="ids, tenants and limits")
    for action in (add, revoke, listing):
        action.add_argument("--keys-file", type=Path, required=True, metavar="FILE")
    revoke.add_argument("id", help="the 12 digits after wk_")
    add.add_argument("--tenant", required=True, help="whose: tenants share no cached prefix, and get equal service")
    add.add_argument("--model", action="append", dest="models", metavar="NAME", help="one it may use (default: all)")
    add.add_argument("--class", dest="service_class", choices=[*ServiceClass], default=ServiceClass.INTERACTIVE)
    add.add_argument("--requests-per-minute", type=float, metavar="N")
    add.add_argument("--tokens-per-minute", type=float, metavar="N", help="of prompts and answers together")
    add.add_argument("--concurrent-requests", type=int, metavar="N")
    add.add_argument("--burst-seconds", type=float, metavar="S", help="how much of the rate an idle caller saves up")
    add.add_argument("--admin", action="store_true", help="for the admin endpoints, and nothing else")
    add.add_argument("--note", default="", help="for people: whose it is, what for")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    try:
        match arguments.action:
            case "add":
                _add(arguments)
            case "revoke":
                with exclusive(arguments.keys_file):
                    write_keys(arguments.keys_file, read_keys(arguments.keys_file).without_key(arguments.id))
                print(f"revoked {arguments.id}")
            case "list":
                _list(read_keys(arguments.keys_file))
            case _:
                raise AssertionError(arguments.action)
    except (InvalidArgumentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _add(arguments: argparse.Namespace) -> None:
    limits = {
        name: value
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "burst_seconds")
        if (value := getattr(arguments, name)) is not None
    }
    key, record = new_key(
        {
            "tenant": arguments.tenant,
            "models": arguments.models,
            "service_class": arguments.service_class,
            "limits": limits,
            "admin": arguments.admin,
            "note": arguments.note,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    path = arguments.keys_file
    with exclusive(path):
        write_keys(path, (read_keys(path) if path.exists() else KeySet()).with_key(key.id, record))
    print("This key is shown once; only its hash is kept.", file=sys.stderr)
    print(key)


def _list(keys: KeySet) -> None:
    print(f"{'id':12}  {'tenant':20}  {'class':11}  {'requests/min':>12}  {'tokens/min':>12}  created, note")
    for key_id, record in sorted(keys.keys.items(), key=lambda item: (item[1].tenant, item[1].created)):
        limits = record.limits
        rates = ["-" if n is None else f"{n:g}" for n in (limits.requests_per_minute, limits.tokens_per_minute)]
        kind = "admin" if record.admin else record.service_class
        print(
            f"{key_id:12}  {record.tenant:20}  {kind:11}  {rates[0]:>12}  {rates[1]:>12}"
            f"  {' '.join(filter(None, (record.created, record.note)))}"
        )
