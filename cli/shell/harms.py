"""A table of programs with harmful arguments: a program's name, and a function of the words after it.

Takes the words of one command; gives the harm as a phrase, or None. Creating a file is harm for a system file only.
"""

# ruff: noqa: E501  the table reads as one
from __future__ import annotations

import re
from collections.abc import Sequence

from longspec.cli.shell.arguments import (
    Harm,
    acting,
    always,
    either,
    given,
    has,
    is_system,
    is_void,
    leading,
    matching,
    operands,
    saying,
    unless,
    writing,
)
from longspec.cli.shell.bash_ast import Word
from longspec.cli.shell.git import git

__all__ = ["HARMS"]


def _dd(words: Sequence[Word]) -> str | None:
    targets = [Word(word.text[3:], word.known) for word in words if word.text.startswith("of=")]
    unclear = any(not word.known and "=" not in word.text for word in words)
    if unclear or any(not is_void(target) for target in targets):
        return "writes over a file or a device"
    return None


def _tee(words: Sequence[Word]) -> str | None:
    targets = [word for word in operands(words) if not is_void(word) and not word.text.startswith(">(")]
    if any(is_system(target) for target in targets):
        return "writes to a file of the system"
    return "replaces what its files hold" if targets and not has(words, "a", "--append", exact=True) else None


def _chmod(words: Sequence[Word]) -> str | None:
    if has(words, "R", "--recursive"):
        return "changes the rights of everything below a folder"
    mode = next((word.text for word in operands(words)), "")
    if re.fullmatch(r"0*[0-7]{0,3}[2367]", mode) or re.search(r"(^|,)([augo]*[ao][augo]*)?[+=][rx]*w", mode):
        return "lets everybody write"
    if re.fullmatch(r"0*[1-7][0-7]{3}", mode) or re.search(r"[+=][rwx]*s", mode):
        return "makes a program run with another's rights"
    return "takes all rights away" if re.fullmatch(r"0+", mode) else None


def _kill(words: Sequence[Word]) -> str | None:
    first = words[0].text if words else ""
    looks = first in ("-l", "-L", "--list", "--table", "-0") or (first == "-s" and words[1:2] == [Word("0")])
    return None if looks or not words else "ends processes"


def _sed(words: Sequence[Word]) -> str | None:
    if has(words, "i", "--in-place"):
        return "rewrites files in place"
    text = " ".join(word.text for word in words)
    runs = re.search(r"(^|[\s;}/|#,0-9gpI])[ew]\s+[^\s/]|([/|#,])[gpI0-9]*e[gpI0-9]*(\s|;|}|$)", text)
    return "may run commands or write files from its script" if runs else None


def _awk(words: Sequence[Word]) -> str | None:
    text = " ".join(word.text for word in words)
    if has(words, "i", "--inplace", exact=True) and "inplace" in text:
        return "rewrites files in place"
    runs = re.search(r"system\s*\(|\|&?\s*(\"|getline|[a-z])|printf?[^;}\n]*>>?\s*[\"a-zA-Z$(]|getline\s*<", text)
    return "may run commands or write files from its script" if runs else None


_DELETE = "deletes files for good"
_REPLACE = "may replace a file that is there; -n keeps it"
_DISK = "changes a disk or its file systems"
_CODE = "runs code that can't be judged"
_RIGHTS = "acts with another user's rights"
_STATE = "changes what runs on this machine"
_CLOUD = r"\b(delete|destroy|terminate|purge|remove|rm|rb|del|drain|uninstall|prune|wipe|reset)\b|\b(delete|terminate)-|--delete"
_SQL = r"\b(drop|delete|truncate|update|alter|replace|insert|grant|revoke|dropdatabase|deletemany|flushall|flushdb)\b"

_NAMED: dict[str, Harm] = {
    "rm unlink srm shred wipe rimraf del-cli": always(_DELETE),
    "rmdir": given("deletes folders above too", "p", "--parents"),
    "truncate": always("cuts files off"),
    "fallocate": given("makes holes in files", "p", "c", "z", "--punch-hole", "--collapse-range", "--zero-range"),
    "mv": unless(_REPLACE, "n", "i", "b", "--no-clobber", "--interactive", "--backup"),
    "cp": unless(_REPLACE, "n", "i", "b", "--no-clobber", "--interactive", "--backup"),
    "install": unless("may replace a file that is there", "d", "b", "--directory", "--backup"),
    "rename prename file-rename mmv": unless("may replace files that are there", "n", "--nono", "--no-act", "--no-overwrite"),
    "ln": given("replaces a file by a link", "f", "--force"),
    "tee sponge": _tee,
    "dd": _dd,
    "mkswap mkfs mke2fs wipefs fdisk sfdisk cfdisk gdisk sgdisk parted blkdiscard hdparm cryptsetup mdadm lvremove "
    "vgremove pvremove lvreduce zpool zfs e2fsck fsck resize2fs tune2fs badblocks swapoff losetup diskutil format": either(
        matching("", r"^$"),
        lambda words: None if has(words, "l", "N", "--list", "--help", "--version") or _looks(words) else _DISK,
    ),
    "chmod": _chmod,
    "setfacl": unless("changes the rights of files", "--test"),
    "chattr": always("changes the rights of files"),
    "chown chgrp": given("changes the rights of everything below a folder", "R", "--recursive"),
    "kill killall skill": _kill,
    "xkill": always("ends processes"),
    "pkill fuser": lambda words: None if has(words, "0", "l") and not has(words, "k") else (
        "ends processes" if words else None),
    "shutdown reboot halt poweroff init telinit": always("stops the machine"),
    "systemctl launchctl rc-service service": saying(
        _STATE, "stop", "disable", "mask", "kill", "isolate", "poweroff", "reboot", "halt", "restart", "suspend", "unload",
        "remove", "bootout", "hibernate", "rescue", "emergency", "kexec", "revert", "set-default", "try-restart"),
    "sudo doas su pkexec run0 gosu runuser": always(_RIGHTS),
    "passwd chpasswd userdel groupdel deluser delgroup usermod useradd groupmod visudo vipw": always("changes accounts"),
    "iptables ip6tables nft ufw firewall-cmd": lambda words: None if has(words, "L", "S", "--list-all") or _looks(words)
    else "changes the firewall",
    "ip ifconfig route nmcli networksetup": saying("changes the network", "del", "delete", "flush", "down", "off"),
    "insmod rmmod modprobe sysctl setenforce": lambda words: None if has(words, "n", "a") and not has(words, "w")
    else _STATE if words else None,
    "umount": given("takes a file system away", "a", "l", "f", "R"),
    "crontab": lambda words: None if has(words, "l") else "replaces or deletes scheduled commands",
    "at batch": lambda words: None if has(words, "l", "q") else _CODE,
    "history": given("deletes history", "c", "d", "w"),
    "find": lambda words: next((
        f"find {w.text} " + ("deletes what it finds" if w.text == "-delete" else "replaces a file")
        for w in words if w.text in ("-delete", "-fprint", "-fprint0", "-fprintf", "-fls")), None),
    "sed gsed": _sed,
    "awk gawk mawk nawk": _awk,
    "perl ruby": lambda words: "rewrites files in place" if leading(words, r"-[0-9a-zA-Z]*i") else None,
    "vi vim nvim ex ed view emacs": matching(
        _CODE, r"(^|\s)(\+(?!\d*(\s|$))|-\w*[cs]\b|-es|--cmd|--eval|-batch|--batch|--script)"),
    "emacsclient": matching(_CODE, r"(^|\s)(-e|--eval)\b"),
    "prettier gofmt goimports shfmt eslint stylelint clang-format yq": matching(
        "rewrites files in place", r"(^|\s)(-w|-i|--write|--fix|--in-?place)\b"),
    "black isort autopep8 rustfmt": unless("rewrites files in place", "--check", "--diff", "--version"),
    "mogrify": always("rewrites files in place"),
    "ffmpeg": matching("replaces files that are there", r"(^|\s)-y(\s|$)"),
    "hg svn bzr": either(
        acting("throws changes away", "revert|strip|purge|rollback|delete|remove|rm"),
        matching("throws changes away", r"^(update|up|checkout|co)\s.*(-C|--clean)\b")),
    "adb": saying("removes packages", "uninstall"),
    "less more": matching(_CODE, r"(^|\s)\+\+?[!|]"),
    "git": git,
    "tar bsdtar gtar": either(
        given("deletes what it packed", "--remove-files", "--delete", "--recursive-unlink", "--unlink-first", "--overwrite"),
        writing("-f", "--file")),
    "zip": matching("deletes what it packed, or entries of an archive", r"(^|\s)(-[a-zA-Z0-9]*[md]\b|--move|--delete)"),
    "unzip": given("replaces files that are there", "o"),
    "7z 7za 7zr rar unrar": matching("replaces or deletes files", r"^d\b|(^|\s)-(sdel|aoa|df|o\+|y)\b"),
    "gzip bzip2 xz zstd gunzip unxz bunzip2": given("may replace a file that is there", "f", "--force", "--rm"),
    "rsync": lambda words: None if has(words, "n", "--dry-run") else matching(
        "deletes files at one of its ends", r"(^|\s)--(del|remove-source|inplace|force)")(words),
    "sort uniq shuf": lambda words: None,
    "curl": either(writing("-o", "--output"), matching(
        "changes something at the other end", r"(-X\s*|--request[ =])['\"]?(delete|put|patch)")),
    "http https xh xhs": matching("changes something at the other end", r"(^|\s)(delete|put|patch)\s"),
    "wget": writing("-O", "--output-document", "-P"),
    "nc ncat netcat socat": matching("hands a program to the network", r"(^|\s)-[a-z]*[ec]\b|exec:|system:|--exec|--sh-exec"),
    "patch": unless("changes files", "--dry-run"),
    "docker podman nerdctl docker-compose": either(
        acting("deletes or stops containers, or what belongs to them", r"rmi?|prune|kill|stop|down|remove", deep=True),
        matching("gives a container rights over the machine", r"--privileged|(-v|--volume[ =])\s*/:")),
    "kubectl helm oc terraform tofu pulumi aws gcloud gsutil az doctl flyctl heroku vagrant gh rclone s3cmd mc": matching(
        "deletes what lies elsewhere", _CLOUD + r"|\b(destroy|apply|sync|purge|unpublish|scale|replace)\b"),
    "mysql mariadb psql sqlite3 mongo mongosh redis-cli clickhouse-client duckdb": matching("changes a database", _SQL),
    "dropdb dropuser": always("deletes from a database"),
    "mysqladmin": saying("changes a database", "drop", "shutdown", "flush-hosts"),
    "apt apt-get aptitude dpkg rpm dnf yum zypper pacman apk snap flatpak brew port": either(
        acting("removes packages", r"remove|(auto)?purge|autoremove|erase|uninstall|rm|del|(auto)?clean"),
        matching("removes packages", r"(^|\s)(-(R\w*|r|P|e)\b|--(remove|purge|erase))")),
    "pip pip3 npm pnpm yarn cargo gem conda uv pipx": acting(
        "removes or withdraws packages", r"uninstall|un|unpublish|remove|r|rm|prune|deprecate|yank", deep=True),
    "journalctl": matching("deletes logs", r"--vacuum|--rotate"),
    "tmux screen": saying("ends what runs in it", "kill-server", "kill-session", "kill-pane", "kill-window", "quit", "kill"),
    "gpg gpg2": matching("deletes keys", r"--delete"),
    "defaults": saying("deletes settings", "delete", "remove"),
    "gsettings dconf": saying("deletes settings", "reset", "reset-recursively"),
    "tmutil": saying("deletes backups", "delete", "deletelocalsnapshots", "disable"),
    "hash": given("makes a name mean another program", "p"),
    "trash-empty": always(_DELETE),
    "busybox toybox": lambda words: None,
}  # fmt: skip


def _looks(words: Sequence[Word]) -> bool:
    """Whether the command only queries a state."""
    return bool(
        {word.text for word in words} & {"print", "list", "status", "info", "show", "get", "luksDump", "--state"}
    )


HARMS: dict[str, Harm] = {name: harm for names, harm in _NAMED.items() for name in names.split()}
"""By the name of a program, without its folder."""
