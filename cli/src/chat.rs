//! `overfill chat`: a conversation, turn by turn.

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, Result};
use clap::Args;
use overfill_proto::v1::{Message, Messages, generate_request::Prompt};

use crate::generate::{Options, message, stream};
use crate::router_client::RouterUrl;

const AFTER_HELP: &str = "\
Each input line is one user message. An empty line or the end of input ends the conversation.

Examples, while a cluster runs (overfill up):
  overfill chat
  overfill chat --system \"Answer in one sentence.\" --max-tokens 64";

/// A conversation on standard input and output. An empty line or end of input ends it.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct ChatArgs {
    /// System message that begins the conversation.
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    system: Option<String>,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    router: RouterUrl,
}

/// Runs the subcommand.
pub async fn run(args: ChatArgs) -> Result<()> {
    let mut client = args.router.connect().await?;
    let mut messages: Vec<Message> = args.system.into_iter().map(|content| message("system", content)).collect();
    while let Some(line) = read_line()? {
        messages.push(message("user", line));
        let prompt = Prompt::Messages(Messages { messages: messages.clone(), ..Messages::default() });
        match stream(&mut client, prompt, &args.options).await {
            Ok(answer) => {
                answer.print_timings(args.options.json());
                messages.push(message("assistant", answer.text));
            }
            // A refused turn leaves the conversation as it was.
            Err(error) => {
                messages.pop();
                eprintln!("error: {error:#}");
            }
        }
    }
    Ok(())
}

fn read_line() -> Result<Option<String>> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        eprint!("> ");
        std::io::stderr().flush().context("writing the prompt")?;
    }
    let mut line = String::new();
    stdin.lock().read_line(&mut line).context("reading standard input")?;
    let line = line.trim();
    Ok((!line.is_empty()).then(|| line.to_owned()))
}
