"""A table of programs with harmful arguments: a program's name, and a function of the words after it.

Takes the words of one command; gives the harm as a phrase, or None. Creating a file is harm for a system file only.
"""

# ruff: noqa: E501  the table reads as one
from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from longspec.cli.shell.bash_ast import Word

__all__ = ["HARMS", "has", "is_system", "is_void", "operands"]

Harm = Callable[[Sequence[Word]], str | None]

_VOIDS = {"/dev/null", "/dev/stdout", "/dev/stderr", "/dev/tty", "-"}
_SYSTEM = re.compile(
    r"(/(dev|etc|boot|sys|proc|usr|bin|sbin|lib|lib64|System)(/|$))"
    r"|.*(^|/)\.(ssh|gnupg)/|.*(^|/)\.(bashrc|bash_profile|profile|zshrc|zshenv|zprofile|login)$|.*/config\.fish$"
)


def is_void(word: Word) -> bool:
    """Whether writing to this file keeps nothing, as with /dev/null."""
    return word.known and (word.text in _VOIDS or word.text.startswith("/dev/fd/"))


def is_system(word: Word) -> bool:
    """Whether this is a device, a system file, or a file that controls logins or shell start-up."""
    return _SYSTEM.match(re.sub(r"/(\./|/)*", "/", word.text)) is not None and not is_void(word)


def has(words: Sequence[Word], *flags: str, exact: bool = False) -> bool:
    """Whether one of the flags is given: `r` also in `-xrf`; `--force` also as `--forc`, unless `exact`."""
    for word in words:
        text = word.text
        if text == "--":
            return False
        for flag in flags:
            if flag.startswith("--"):
                name = text.split("=")[0]
                if name == flag or (not exact and len(name) > 4 and flag.startswith(name)):
                    return True
            elif len(flag) > 1:
                if text == flag:
                    return True
            elif re.match(r"-[A-Za-z0-9]", text) and flag in text[1:]:
                return True
    return False


def operands(words: Sequence[Word]) -> list[Word]:
    """The arguments that aren't options; an option's value counts as one."""
    found, open_ = [], True
    for word in words:
        if open_ and word.text == "--":
            open_ = False
        elif not (open_ and word.known and word.text.startswith("-") and word.text != "-"):
            found.append(word)
    return found


def _always(harm: str) -> Harm:
    return lambda words: harm


def _with(harm: str, *flags: str) -> Harm:
    """Harmful with one of these flags."""
    return lambda words: harm if has(words, *flags) else None


def _without(harm: str, *flags: str) -> Harm:
    """Harmful unless one of these flags is there."""
    return lambda words: None if has(words, *flags, exact=True) else harm


def _saying(harm: str, *said: str) -> Harm:
    """Harmful where one of these words is among the arguments."""
    return lambda words: harm if {word.text for word in words} & set(said) else None


def _matching(harm: str, pattern: str) -> Harm:
    """Harmful where the arguments, as one text, match."""
    search = re.compile(pattern, re.IGNORECASE | re.DOTALL).search
    return lambda words: harm if search(" ".join(word.text for word in words)) else None


def _writes(*flags: str) -> Harm:
    """Harmful where an option's value names a system file to write."""

    def harm(words: Sequence[Word]) -> str | None:
        texts = [word.text for word in words]
        for at, text in enumerate(texts):
            for flag in flags:
                value = text[len(flag) :].lstrip("=") or " ".join(texts[at + 1 : at + 2])
                if text.startswith(flag) and is_system(Word(value)):
                    return f"writes to {value}"
        return None

    return harm


def _any(*harms: Harm) -> Harm:
    """The first harm of several."""
    return lambda words: next((said for harm in harms if (said := harm(words))), None)


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


_RUNS_CODE = re.compile(
    r"system|popen|exec|spawn|subprocess|rmtree|unlink|remove|rmdir|rename|truncate|shutil|fork|kill|eval|import\s+os"
    r"|import\s+pty|socket|requests|urllib|base64|writeFile|appendFile|\.write|write_|delete|child_process|File\.|`"
    r"|open\s*\([^)]*['\"][rb]*[wax+]|open\b[^;]*>|__import__|getattr|chmod|chown|mkfs|getline|\bdo\s+['\"]"
)


def _code(*flags: str) -> Harm:
    """Harmful where an argument is code in another language that calls destructive functions, found by name, as the
    code isn't parsed.
    """

    def harm(words: Sequence[Word]) -> str | None:
        for at, word in enumerate(words):
            if re.match(rf"-[A-Za-z0-9]*[{''.join(flags)}]|--eval|--execute|--run|--print$", word.text):
                code = word.text + " ".join(each.text for each in words[at + 1 :])
                unclear = any(not each.known for each in words[at + 1 : at + 2])
                if unclear or _RUNS_CODE.search(code):
                    return "runs code that may change files or start programs, which can't be judged"
        return None

    return harm


def _awk(words: Sequence[Word]) -> str | None:
    text = " ".join(word.text for word in words)
    if has(words, "i", "--inplace", exact=True) and "inplace" in text:
        return "rewrites files in place"
    runs = re.search(r"system\s*\(|\|&?\s*(\"|getline|[a-z])|printf?[^;}\n]*>>?\s*[\"a-zA-Z$(]|getline\s*<", text)
    return "may run commands or write files from its script" if runs else None


def _git(words: Sequence[Word]) -> str | None:
    rest, at = list(words), 0
    while at < len(rest) and rest[at].text.startswith("-"):
        if rest[at].text == "-c" or rest[at].text.startswith(("--config-env", "--exec-path")):
            value = rest[at + 1].text if at + 1 < len(rest) else ""
            if re.match(r"alias|core\.(pager|editor|sshcommand|fsmonitor|hookspath)|.*helper|.*cmd|pager|diff|filter",
                        value.lower()) or "!" in value:  # fmt: skip
                return "takes a program from its settings, which can't be judged"
        at += 2 if rest[at].text in ("-C", "-c", "--git-dir", "--work-tree", "--namespace") else 1
    if at >= len(rest):
        return None
    if not rest[at].known:
        return "does what a variable says, which can't be judged"
    harm = _GIT.get(rest[at].text)
    return harm(rest[at + 1 :]) if harm else None


def _push(words: Sequence[Word]) -> str | None:
    if has(words, "f", "d", "--force", "--force-with-lease", "--mirror", "--delete", "--prune"):
        return "overwrites or deletes what others have"
    return "overwrites or deletes what others have" if any(w.text[:1] in "+:" for w in operands(words)) else None


def _checkout(words: Sequence[Word]) -> str | None:
    paths = has(words, "f", "--force", "--ours", "--theirs") or any(w.text in ("--", ".", "./") for w in words)
    return "throws uncommitted changes away" if paths else None


def _restore(words: Sequence[Word]) -> str | None:
    staged = has(words, "S", "--staged", exact=True) and not has(words, "W", "--worktree")
    return None if staged else "throws uncommitted changes away"


_GIT: dict[str, Harm] = {
    "push": _push,
    "clean": _without("deletes files that git doesn't know", "n", "--dry-run"),
    "reset": _with("throws uncommitted changes away", "--hard", "--merge", "--keep"),
    "checkout": _checkout,
    "restore": _restore,
    "switch": _with("throws uncommitted changes away", "f", "C", "--force", "--discard-changes", "--force-create"),
    "branch": _with("deletes or replaces a branch", "D", "d", "M", "C", "f", "--delete", "--force"),
    "tag": _with("deletes or replaces a tag", "d", "f", "--delete", "--force"),
    "stash": _saying("throws stashed changes away", "drop", "clear"),
    "rm": _without("deletes files", "n", "--dry-run", "--cached"),
    "mv": _with("may replace files", "f", "--force"),
    "reflog": _saying("deletes what could bring commits back", "expire", "delete"),
    "gc": _with("deletes what could bring commits back", "--prune", "--aggressive"),
    "prune": _without("deletes what could bring commits back", "n", "--dry-run"),
    "filter-branch": _always("rewrites history"),
    "filter-repo": _always("rewrites history"),
    "update-ref": _with("deletes a reference", "d"),
    "remote": _saying("deletes a remote", "remove", "rm", "prune"),
    "worktree": _saying("deletes a working tree", "remove", "prune"),
    "submodule": _saying("throws a submodule's changes away", "deinit"),
    "apply": _without("changes files", "--check", "--stat", "--numstat", "--summary"),
    "rebase": _with("runs commands between commits, which can't be judged", "x", "--exec"),
    "bisect": _saying("runs a command, which can't be judged", "run"),
}

_DELETE = "deletes files for good"
_REPLACE = "may replace a file that is there; -n keeps it"
_DISK = "changes a disk or its file systems"
_CODE = "runs code that can't be judged"
_RIGHTS = "acts with another user's rights"
_STATE = "changes what runs on this machine"
_CLOUD = (
    r"\b(delete|destroy|terminate|purge|remove|rm|rb|drain|uninstall|prune|wipe|reset)\b|\b(delete|terminate)-|--delete"
)
_SQL = r"\b(drop|delete|truncate|update|alter|replace|insert|grant|revoke|dropdatabase|deletemany|flushall|flushdb)\b"

_NAMED: dict[str, Harm] = {
    "rm unlink srm shred wipe": _always(_DELETE),
    "rmdir": _with("deletes folders above too", "p", "--parents"),
    "truncate": _always("cuts files off"),
    "fallocate": _with("makes holes in files", "p", "c", "z", "--punch-hole", "--collapse-range", "--zero-range"),
    "mv": _without(_REPLACE, "n", "i", "b", "--no-clobber", "--interactive", "--backup"),
    "cp": _without(_REPLACE, "n", "i", "b", "--no-clobber", "--interactive", "--backup"),
    "install": _without("may replace a file that is there", "d", "b", "--directory", "--backup"),
    "rename prename file-rename": _without("may replace files that are there", "n", "--nono", "--no-act", "--no-overwrite"),
    "ln": _with("replaces a file by a link", "f", "--force"),
    "tee sponge": _tee,
    "dd": _dd,
    "mkswap mkfs mke2fs wipefs fdisk sfdisk cfdisk gdisk sgdisk parted blkdiscard hdparm cryptsetup mdadm lvremove "
    "vgremove pvremove lvreduce zpool zfs e2fsck fsck resize2fs tune2fs badblocks swapoff losetup diskutil format": _any(
        _matching("", r"^$"),
        lambda words: None if has(words, "l", "N", "--list", "--help", "--version") or _looks(words) else _DISK,
    ),
    "chmod": _chmod,
    "chown chgrp setfacl chattr": _with("changes the rights of everything below a folder", "R", "--recursive"),
    "kill killall skill": _kill,
    "pkill xkill fuser": lambda words: None if has(words, "0", "l") and not has(words, "k") else (
        "ends processes" if words else None),
    "shutdown reboot halt poweroff init telinit": _always("stops the machine"),
    "systemctl launchctl rc-service service": _saying(
        _STATE, "stop", "disable", "mask", "kill", "isolate", "poweroff", "reboot", "halt", "restart", "suspend", "unload",
        "remove", "bootout", "hibernate", "rescue", "emergency", "kexec", "revert", "set-default", "try-restart"),
    "sudo doas su pkexec run0 gosu runuser": _always(_RIGHTS),
    "passwd chpasswd userdel groupdel deluser delgroup usermod useradd groupmod visudo vipw": _always("changes accounts"),
    "iptables ip6tables nft ufw firewall-cmd": lambda words: None if has(words, "L", "S", "--list-all") or _looks(words)
    else "changes the firewall",
    "ip ifconfig route nmcli networksetup": _saying("changes the network", "del", "delete", "flush", "down", "off"),
    "insmod rmmod modprobe sysctl setenforce": lambda words: None if has(words, "n", "a") and not has(words, "w")
    else _STATE if words else None,
    "umount": _with("takes a file system away", "a", "l", "f", "R"),
    "crontab": lambda words: None if has(words, "l") else "replaces or deletes scheduled commands",
    "at batch": lambda words: None if has(words, "l", "q") else _CODE,
    "history": _with("deletes history", "c", "d", "w"),
    "find": lambda words: next((
        f"find {w.text} " + ("deletes what it finds" if w.text == "-delete" else "replaces a file")
        for w in words if w.text in ("-delete", "-fprint", "-fprint0", "-fprintf", "-fls")), None),
    "sed gsed": _sed,
    "awk gawk mawk nawk": _awk,
    "perl": _any(_matching("rewrites files in place", r"(^|\s)-[0-9a-z]*i"), _code("e", "E")),
    "ruby": _any(_matching("rewrites files in place", r"(^|\s)-[a-z]*i"), _code("e")),
    "python python2 python3 pypy pypy3": _code("c"),
    "node nodejs deno bun": _code("e", "p"),
    "php": _code("r"),
    "lua luajit Rscript R julia osascript tclsh guile sbcl ghc elixir": _code("e"),
    "vi vim nvim ex ed view emacs": _matching(_CODE, r"(^|\s)(\+|-c|-s\b|-es|--cmd|--eval|-batch|--batch|--script)"),
    "git": _git,
    "tar bsdtar gtar": _any(
        _with("deletes what it packed", "--remove-files", "--delete", "--recursive-unlink", "--unlink-first"),
        _with(_CODE, "--checkpoint-action", "--to-command", "--use-compress-program", "--rsh-command", "--info-script",
              "I"),
        _writes("-f", "--file")),
    "zip": _matching("deletes what it packed, or entries of an archive", r"(^|\s)(-[a-zA-Z0-9]*[md]\b|--move|--delete)"),
    "unzip": _with("replaces files that are there", "o"),
    "7z 7za 7zr rar unrar": _matching("replaces or deletes files", r"^d\b|(^|\s)-(sdel|aoa|df|o\+|y)\b"),
    "gzip bzip2 xz zstd gunzip unxz bunzip2": _with("may replace a file that is there", "f", "--force", "--rm"),
    "rsync": _matching("deletes files at one of its ends", r"(^|\s)--(del|remove-source|inplace|force)"),
    "sort uniq": _writes("-o", "--output"),
    "curl": _any(_writes("-o", "--output"), _matching(
        "changes something at the other end", r"(-X\s*|--request[ =])['\"]?(delete|put|patch)")),
    "wget": _writes("-O", "--output-document", "-P"),
    "nc ncat netcat socat": _matching("hands a program to the network", r"(^|\s)-[a-z]*[ec]\b|exec:|system:|--exec|--sh-exec"),
    "patch": _without("changes files", "--dry-run"),
    "docker podman nerdctl docker-compose": _matching(
        "deletes or stops containers, or what belongs to them",
        r"\b(rm|rmi|prune|kill|stop|down|remove)\b|--privileged|(-v|--volume[ =])\s*/:"),
    "kubectl helm oc terraform tofu pulumi aws gcloud gsutil az doctl flyctl heroku vagrant gh rclone s3cmd mc": _matching(
        "deletes what lies elsewhere", _CLOUD + r"|\b(destroy|apply|sync|purge|unpublish|scale|replace)\b"),
    "mysql mariadb psql sqlite3 mongo mongosh redis-cli clickhouse-client duckdb": _matching("changes a database", _SQL),
    "dropdb dropuser": _always("deletes from a database"),
    "mysqladmin": _saying("changes a database", "drop", "shutdown", "flush-hosts"),
    "apt apt-get aptitude dpkg dnf yum zypper pacman apk snap flatpak brew port": _matching(
        "removes packages", r"\b(remove|purge|autoremove|erase|uninstall|rm|del|autoclean|clean)\b|(^|\s)-(R\w*|r|P|e)\b"),
    "pip pip3 npm pnpm yarn cargo gem conda uv pipx": _matching(
        "removes or withdraws packages", r"\b(uninstall|unpublish|remove|rm|prune|deprecate|yank)\b"),
    "journalctl": _matching("deletes logs", r"--vacuum|--rotate"),
    "tmux screen": _saying("ends what runs in it", "kill-server", "kill-session", "kill-pane", "kill-window", "quit", "kill"),
    "gpg gpg2": _matching("deletes keys", r"--delete"),
    "defaults": _saying("deletes settings", "delete", "remove"),
    "gsettings dconf": _saying("deletes settings", "reset", "reset-recursively"),
    "tmutil": _saying("deletes backups", "delete", "deletelocalsnapshots", "disable"),
    "hash": _with("makes a name mean another program", "p"),
    "trash-empty": _always(_DELETE),
    "busybox toybox": lambda words: None,
}  # fmt: skip


def _looks(words: Sequence[Word]) -> bool:
    """Whether the command only queries a state."""
    return bool(
        {word.text for word in words} & {"print", "list", "status", "info", "show", "get", "luksDump", "--state"}
    )


HARMS: dict[str, Harm] = {name: harm for names, harm in _NAMED.items() for name in names.split()}
"""By the name of a program, without its folder."""
