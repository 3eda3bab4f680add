# Alt-G: the line that stands at the prompt becomes a command for what it says. Nothing runs before Enter.
_longspec_command() {
  [[ -n $READLINE_LINE ]] || return
  local line
  line=$(longspec command --no-stdin --shell bash --allow-destructive -- "$READLINE_LINE") || return
  READLINE_LINE=$line
  READLINE_POINT=${#line}
}
bind -x '"\eg": _longspec_command'
