//! `overfill completions` and `overfill man`: shell completions and manual pages, made from the command line's definition.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::Cli;

const COMPLETIONS_HELP: &str = "\
Examples:
  overfill completions bash > ~/.local/share/bash-completion/completions/overfill
  overfill completions fish > ~/.config/fish/completions/overfill.fish";

const MAN_HELP: &str = "\
Examples:
  overfill man | man -l -
  overfill man --dir ~/.local/share/man/man1";

/// Which completions to print.
#[derive(Args)]
#[command(after_help = COMPLETIONS_HELP)]
pub struct CompletionsArgs {
    /// Shell to print completions for.
    shell: Shell,
}

/// Which pages to write, and where.
#[derive(Args)]
#[command(after_help = MAN_HELP)]
pub struct ManArgs {
    /// Folder for one page per command, for example overfill-up.1 [default: print the main page]
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// Writes completions to standard output.
pub fn completions(args: &CompletionsArgs) -> Result<()> {
    print(&completion_script(args.shell))
}

/// Writes the main page to standard output, or all pages to a folder.
pub fn man(args: &ManArgs) -> Result<()> {
    let Some(dir) = &args.dir else {
        let mut page = Vec::new();
        Man::new(Cli::command()).render(&mut page)?;
        return print(&page);
    };
    std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir).with_context(|| format!("writing pages to {}", dir.display()))
}

fn completion_script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "overfill", &mut script);
    script
}

fn print(text: &[u8]) -> Result<()> {
    std::io::stdout().write_all(text).context("writing to standard output")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::{Command, Parser, ValueEnum};

    use super::*;

    /// Most flags of a command without headings.
    const FEW: usize = 5;

    /// Calls `visit` with each command and its full name.
    fn walk(command: &Command, parent: &str, visit: &mut impl FnMut(&Command, &str)) {
        let name = format!("{parent}{}", command.get_name());
        visit(command, &name);
        for child in command.get_subcommands() {
            walk(child, &format!("{name} "), visit);
        }
    }

    fn commands(visit: &mut impl FnMut(&Command, &str)) {
        walk(&Cli::command(), "", visit);
    }

    /// The words of a command line: comments, pipes, redirections and && end it; double quotes group words.
    fn words(line: &str) -> Vec<String> {
        let line = line.split(['#', '|', '>', '&']).next().unwrap_or_default();
        let mut words = Vec::new();
        for (i, part) in line.split('"').enumerate() {
            match i % 2 {
                0 => words.extend(part.split_whitespace().map(str::to_owned)),
                _ => words.push(part.to_owned()),
            }
        }
        words
    }

    #[test]
    fn every_command_has_examples_that_parse() {
        commands(&mut |command, name| {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let (_, examples) = help.split_once("Examples").unwrap_or_else(|| panic!("{name} has no examples"));
            assert!(examples.contains(&format!("\n  {name}")), "{name}: no example of this command");
            for line in examples.lines().filter(|line| line.starts_with("  overfill")) {
                match Cli::try_parse_from(words(line)) {
                    Ok(_) => {}
                    Err(error) => assert!(!error.use_stderr(), "{name}: {line}: {error}"),
                }
            }
        });
    }

    #[test]
    fn flags_have_headings_where_there_are_many() {
        commands(&mut |command, name| {
            let flags = command.get_opts().filter(|flag| !["help", "version"].contains(&flag.get_id().as_str()));
            let flags: Vec<_> = flags.collect();
            for flag in flags.iter().filter(|_| flags.len() > FEW) {
                assert!(flag.get_help_heading().is_some(), "{name} {flag}: no heading");
            }
        });
    }

    #[test]
    fn every_command_flag_and_value_is_explained() {
        let explained = |help: Option<&clap::builder::StyledStr>| {
            help.is_some_and(|help| help.to_string().lines().all(|line| !line.trim().is_empty()))
        };
        commands(&mut |command, name| {
            assert!(explained(command.get_about()), "{name}: no description, or an empty line in it");
            for argument in command.get_arguments().filter(|a| a.get_id() != "help" && a.get_id() != "version") {
                assert!(explained(argument.get_help()), "{name} {argument}: no text, or an empty line in it");
            }
        });
    }

    #[test]
    fn completions_name_every_command() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(completion_script(*shell)).unwrap();
            for command in Cli::command().get_subcommands() {
                assert!(script.contains(command.get_name()), "{shell}: {} is missing", command.get_name());
            }
        }
    }

    #[test]
    fn there_is_a_page_for_every_command() {
        let folder = tempfile::tempdir().unwrap();
        man(&ManArgs { dir: Some(folder.path().join("man1")) }).unwrap();
        let entries = std::fs::read_dir(folder.path().join("man1")).unwrap();
        let pages: BTreeSet<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        let mut expected = BTreeSet::new();
        commands(&mut |_, name| {
            expected.insert(format!("{}.1", name.replace(' ', "-")));
        });
        assert_eq!(pages, expected);
    }
}
