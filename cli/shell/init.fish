# Alt-G: the line that stands at the prompt becomes a command for what it says. Nothing runs before Enter.
function _longspec_command
    set -l request (commandline)
    test -n "$request"; or return
    set -l line (longspec command --no-stdin --shell fish --allow-destructive -- "$request")
    and commandline --replace -- $line
    commandline -f repaint
end
bind \eg _longspec_command
