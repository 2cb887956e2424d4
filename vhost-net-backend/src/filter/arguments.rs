//! The command line of `colo-filter`.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand};

use super::endpoint::Endpoint;
use super::serve::Ends;
use crate::proxy::Config;

const FIGURES: &str = "\
The control command `status` answers with:
  primary_in, secondary_in, out, notify, qmp
                        the connections: whether they are there, how often they were made, why they are not there;
                        packets that came, streams that were malformed; bytes that wait to be sent
  proxy                 figures of the comparison: what is held, what left and why, the last mismatch
  pvm_refused           packets of the primary that could not be held any more and were dropped before that
  paused                a marker is here: nothing is taken from the primary until the commit

COLO_LOG says how much is logged: error, warn, info (default), debug, trace.";

/// Takes the place of QEMU's colo-compare object between QEMU's own filters.
///
/// It gets what the primary VM sends (from the primary's filter-redirector) and what the secondary VM sends (from the
/// secondary's filter-redirector, behind its filter-rewriter), and gives back what both have sent. What differs it holds
/// until a checkpoint is committed, which it asks for. See docs/qemu-filters.md.
///
/// An END is unix:PATH or tcp:HOST:PORT, to connect to (again and again until it is there), or the same with ',server' to
/// listen at.
#[derive(Debug, Parser)]
#[command(version, name = "colo-filter", max_term_width = 100, after_long_help = FIGURES)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    /// What a running program is told.
    #[command(subcommand)]
    pub order: Option<CliOrder>,
    /// What is compared.
    #[command(flatten)]
    pub serve: Serve,
}

/// What a running program is told.
#[derive(Debug, Subcommand)]
pub enum CliOrder {
    /// Prints the figures, as JSON
    Status {
        /// The control socket of the program (its --control-path)
        #[arg(long, value_name = "PATH")]
        control_path: PathBuf,
    },
    /// The secondary is lost and this side goes on: lets everything out, what is held first, and compares no more
    TakeOver {
        /// The control socket of the program (its --control-path)
        #[arg(long, value_name = "PATH")]
        control_path: PathBuf,
    },
}

/// What is compared, and with whom.
#[derive(Args, Debug)]
#[group(skip)]
#[command(group = ArgGroup::new("controller").required(true).multiple(true).args(["notify", "qmp", "control_path", "control_fd"]))]
pub struct Serve {
    /// What the primary VM sends: colo-compare's primary_in
    #[arg(long, value_name = "END", required = true)]
    pub primary_in: Option<Endpoint>,

    /// What the secondary VM sends: colo-compare's secondary_in
    #[arg(long, value_name = "END", required = true)]
    pub secondary_in: Option<Endpoint>,

    /// Where to send what may leave: colo-compare's outdev
    #[arg(long, value_name = "END", required = true)]
    pub out: Option<Endpoint>,

    /// Whoever takes checkpoints, in the words that QEMU has for Xen: colo-compare's notify_dev.
    ///
    /// COLO_USERSPACE_PROXY_INIT is answered with COLO_COMPARE_GET_XEN_INIT; DO_CHECKPOINT asks for a checkpoint, and
    /// COLO_CHECKPOINT, sent when it is committed and before either VM runs again, lets out what is held.
    #[arg(long, value_name = "END")]
    pub notify: Option<Endpoint>,

    /// A monitor of the primary's QEMU (its -qmp), for this program alone, where QEMU's own COLO migration (x-colo) takes the
    /// checkpoints.
    #[arg(long, value_name = "END")]
    pub qmp: Option<Endpoint>,

    /// The filters have vnet_hdr_support: virtio-net headers stand in front of the frames
    #[arg(long)]
    pub vnet_hdr: bool,

    /// Unix socket to listen on for a controller (docs/control-protocol.md), and for orders.
    #[arg(long, value_name = "PATH", conflicts_with = "control_fd")]
    pub control_path: Option<PathBuf>,

    /// The same as an inherited descriptor that listens already.
    #[arg(long, value_name = "FD")]
    pub control_fd: Option<RawFd>,

    /// How long a packet is held that the secondary has not sent before a checkpoint is asked for, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub held_ms_max: u64,

    /// How many bytes are held before a checkpoint is asked for. With twice as many, and at least 32 MiB, what the primary
    /// sends is dropped.
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20)]
    pub held_bytes_max: usize,
}

impl Serve {
    /// The connections.
    ///
    /// # Panics
    /// After a subcommand, when there are none.
    pub fn ends(&self) -> Ends {
        let given =
            |end: &Option<Endpoint>| end.clone().expect("it is required where there is no subcommand");
        Ends {
            primary_in: given(&self.primary_in),
            secondary_in: given(&self.secondary_in),
            out: given(&self.out),
            notify: self.notify.clone(),
            monitor: self.qmp.clone(),
            vnet_hdr: self.vnet_hdr,
        }
    }

    /// What the comparison keeps within.
    pub fn config(&self) -> Config {
        Config::holding(self.held_ms_max, self.held_bytes_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let parse =
            |line: &str| Cli::try_parse_from(std::iter::once("colo-filter").chain(line.split_whitespace()));
        let ends = "--primary-in tcp:127.0.0.1:9001 --secondary-in tcp:0.0.0.0:9004,server --out unix:o";
        let cli = parse(&format!("{ends} --notify unix:n,server --vnet-hdr")).unwrap();
        let parsed = cli.serve.ends();
        assert!(parsed.vnet_hdr && parsed.secondary_in.listens && !parsed.out.listens);
        assert!(matches!(parse("status --control-path c").unwrap().order, Some(CliOrder::Status { .. })));
        for wrong in ["", ends, "--out unix:o --notify unix:n", "--primary-in 9001 --notify unix:n"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
