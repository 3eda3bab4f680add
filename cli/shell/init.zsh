# Alt-G: the line that stands at the prompt becomes a command for what it says. Nothing runs before Enter.
_longspec_command() {
  [[ -n $BUFFER ]] || return
  local line
  zle -I
  if line=$(longspec command --no-stdin --shell zsh --allow-destructive -- "$BUFFER"); then
    BUFFER=$line
    CURSOR=$#BUFFER
  fi
}
zle -N _longspec_command
bindkey '\eg' _longspec_command
