//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use vhost_blk_backend::backend::{BUFFER_BYTES_MIN, Options};
use vhost_blk_backend::image::{Direct, Hold, ImageOptions, Source};

/// What `--print-capabilities` prints, as docs/interop/vhost-user.json of QEMU describes it.
pub(crate) const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

/// Serves a raw disk image or block device to a virtual machine as a vhost-user-blk device.
///
/// Alone it is a plain back end: give its --socket-path to QEMU as
/// `-chardev socket,id=disk,path=… -device vhost-user-blk-pci,chardev=disk,num-queues=1`, with guest RAM in a
/// shared memory backend. Under `colo run`, which starts it with --control-fd and --protected, it replicates the
/// disk to a peer.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) order: Option<Order>,
    #[command(flatten)]
    pub(crate) serve: Serve,
}

/// What a running back end is told.
#[derive(Debug, Subcommand)]
pub(crate) enum Order {
    /// Tells a running back end, and so its guest, that the disk has become larger
    ///
    /// Enlarges the image file to BYTES first if it is shorter. Without BYTES, and for a block device, the length that the
    /// file or device has by now is taken over. Prints the length in bytes.
    Resize {
        /// The control socket of the back end (its --control-path)
        #[arg(long, value_name = "PATH")]
        control_path: PathBuf,
        /// The new length in bytes, or with K, M, G or T for powers of 1024; a multiple of the block size
        #[arg(value_parser = bytes)]
        bytes: Option<u64>,
    },
    /// Prints the figures of a running back end, as JSON
    Status {
        /// The control socket of the back end (its --control-path)
        #[arg(long, value_name = "PATH")]
        control_path: PathBuf,
    },
}

/// How a disk is served.
#[derive(Args, Debug)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("socket").required(true).args(["socket_path", "fd"]))]
#[command(group = clap::ArgGroup::new("backing").required(true).args(["blk_file", "null"]))]
#[command(group = clap::ArgGroup::new("control").args(["control_path", "control_fd"]))]
pub(crate) struct Serve {
    /// Unix socket on which the VMM is awaited
    #[arg(long, value_name = "PATH")]
    pub(crate) socket_path: Option<PathBuf>,
    /// The same, as the number of an open descriptor: of a connection, which is served until it ends, or of a listening
    /// socket
    #[arg(long, value_name = "NUMBER")]
    pub(crate) fd: Option<i32>,
    /// Raw disk image or block device; its length must be a multiple of the block size
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,
    /// Instead of one, serve a disk of this length with nothing behind it: reads give zeros, writes are forgotten. To
    /// measure; in bytes, or with K, M, G or T for powers of 1024
    #[arg(long, value_name = "BYTES", value_parser = bytes, conflicts_with = "protected")]
    null: Option<u64>,
    /// Refuse writes; several back ends may then serve one image
    #[arg(long)]
    read_only: bool,
    /// Serial number of the disk, at most 20 bytes
    #[arg(long, default_value = "", value_name = "TEXT")]
    serial: String,
    /// Number of queues, 1 to 64; QEMU's num-queues must not be greater
    #[arg(long, default_value_t = 1, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Number of threads that serve the queues in turn, no more than queues [default: as many as queues, or as cores if
    /// those are fewer]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: Option<u16>,
    /// Cores for the workers, by number, separated by commas: the first worker's, the second's, and so on [default: none in
    /// particular]
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    core: Vec<usize>,
    /// The longest that an idle worker polls before it sleeps, in microseconds; the window adapts, 0 is never to poll
    #[arg(long, default_value_t = 50, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    poll_us: u64,
    /// Go past the host's page cache (O_DIRECT); with --protected never
    #[arg(long, default_value = "auto", value_name = "WHEN")]
    direct: DirectChoice,
    /// Logical blocks that the guest sees, in bytes
    #[arg(long, default_value = "512", value_name = "BYTES", value_parser = block_size())]
    block_size: u32,
    /// The write cache that the guest finds; it may choose the other itself
    #[arg(long, default_value = "writeback", value_name = "MODE")]
    cache: Cache,
    /// Unix socket on which a controller is awaited
    #[arg(long, value_name = "PATH")]
    pub(crate) control_path: Option<PathBuf>,
    /// The same, as the number of an open descriptor that is listening already
    #[arg(long, value_name = "NUMBER")]
    pub(crate) control_fd: Option<i32>,
    /// Touch the disk only as a controller says: until it attaches a peer, requests wait
    #[arg(long, requires = "control", conflicts_with = "read_only")]
    pub(crate) protected: bool,
    /// The VM comes by live migration: another back end may still have the image; it is locked when the guest's first
    /// queue starts here
    #[arg(long, conflicts_with = "protected")]
    incoming: bool,
    /// Limit of the block buffer's memory in bytes; when it is nearly full, a checkpoint is asked for
    #[arg(long, default_value_t = 256 << 20, value_name = "BYTES")]
    pub(crate) buffer_bytes: usize,
    /// Print what this program can do as JSON, ignore everything else, and end
    #[arg(long)]
    print_capabilities: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DirectChoice {
    /// Where the file allows it and its alignment fits the block size
    Auto,
    /// Or do not serve it
    On,
    /// Never
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cache {
    /// What is written is durable when the guest has flushed
    Writeback,
    /// What is written is durable when it is answered
    Writethrough,
}

/// Whether the capabilities are asked for: then the rest of the line need not even make sense.
pub(crate) fn asks_for_capabilities(mut line: impl Iterator<Item = OsString>) -> bool {
    line.any(|argument| argument == "--print-capabilities")
}

impl Serve {
    /// What the device is to be.
    pub(crate) fn options(&self) -> anyhow::Result<Options> {
        ensure!(
            self.serial.len() <= 20,
            "--serial has {} bytes, a virtio disk's serial number has at most 20",
            self.serial.len()
        );
        ensure!(
            self.buffer_bytes >= BUFFER_BYTES_MIN,
            "--buffer-bytes is {}, at least {BUFFER_BYTES_MIN} are needed",
            self.buffer_bytes
        );
        ensure!(
            self.fd.is_none() || self.fd != self.control_fd,
            "--fd and --control-fd name the same descriptor: the VMM and the controller need a socket each"
        );
        ensure!(
            !(self.protected && self.direct == DirectChoice::On),
            "--direct on is not possible with --protected, where the replication goes through the page cache: \
             leave one of them out"
        );
        let source = match (&self.blk_file, self.null) {
            (Some(path), _) => Source::File(path.clone()),
            (None, Some(bytes)) => Source::Null { bytes },
            (None, None) => unreachable!("one of the group is required"),
        };
        let queues = usize::from(self.queues);
        let workers = match self.workers {
            Some(workers) => usize::from(workers),
            // what this process may use: affinity and cgroups count
            None => std::thread::available_parallelism().map_or(1, usize::from).min(queues),
        };
        ensure!(
            workers <= queues,
            "--workers is {workers} and --queues {queues}: a worker without a queue has nothing to do, give at most \
             as many"
        );
        Ok(Options {
            image: ImageOptions {
                read_only: self.read_only,
                direct: match self.direct {
                    _ if self.protected => Direct::Off,
                    DirectChoice::Auto => Direct::Auto,
                    DirectChoice::On => Direct::On,
                    DirectChoice::Off => Direct::Off,
                },
                block_bytes: self.block_size,
                hold: match (self.protected, self.incoming) {
                    (true, _) => Hold::WhileOpen,
                    (false, false) => Hold::WhileServing,
                    (false, true) => Hold::Incoming,
                },
                ..ImageOptions::new(source)
            },
            serial: self.serial.clone(),
            queues,
            workers,
            writeback: self.cache == Cache::Writeback,
            poll: Duration::from_micros(self.poll_us),
            cores: self.core.clone(),
        })
    }
}

fn block_size() -> impl TypedValueParser<Value = u32> {
    PossibleValuesParser::new(["512", "4096"]).try_map(|text| text.parse::<u32>())
}

fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "give a number of bytes, or one with K, M, G or T for powers of 1024".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(rest: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once("vhost-blk-backend").chain(rest.split_whitespace()))
    }

    fn options(rest: &str) -> Result<Options, String> {
        line(rest).map_err(|error| error.to_string())?.serve.options().map_err(|error| error.to_string())
    }

    #[test]
    fn a_plain_disk_needs_two_options() {
        let plain = options("--socket-path s --blk-file d").unwrap();
        assert_eq!(plain.image.source, Source::File("d".into()));
        assert_eq!((plain.image.direct, plain.image.block_bytes), (Direct::Auto, 512));
        assert_eq!((plain.queues, plain.workers, plain.writeback), (1, 1, true));
        let all = "--fd 7 --null 2T --read-only --serial x --queues 64 --workers 3 --core 0,1 --poll-us 0 \
                   --direct on --block-size 4096 --cache writethrough --control-path c --buffer-bytes 100000000";
        let all = options(all).unwrap();
        assert_eq!(all.image.source, Source::Null { bytes: 2 << 40 });
        assert_eq!((all.image.direct, all.image.block_bytes, all.image.read_only), (Direct::On, 4096, true));
        assert_eq!((all.queues, all.workers, all.writeback, all.cores), (64, 3, false, vec![0, 1]));
        let many = options("--socket-path s --blk-file d --queues 64").unwrap();
        assert_eq!(many.workers, std::thread::available_parallelism().unwrap().get().min(64));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_to_do() {
        let plain = "--socket-path s --blk-file d";
        for (rest, words) in [
            ("--blk-file d", "--socket-path <PATH>|--fd <NUMBER>"),
            ("--socket-path s", "--blk-file <PATH>|--null <BYTES>"),
            ("--socket-path s --fd 3 --blk-file d", "cannot be used with"),
            ("--socket-path s --blk-file d --null 1M", "cannot be used with"),
            ("--socket-path s --null 1M --control-fd 5 --protected", "cannot be used with"),
            ("--fd 5 --control-fd 5 --blk-file d", "a socket each"),
            (&format!("{plain} --protected"), "--control-path <PATH>|--control-fd <NUMBER>"),
            (&format!("{plain} --protected --control-fd 3 --read-only"), "cannot be used with"),
            (&format!("{plain} --protected --control-fd 3 --direct on"), "leave one of them out"),
            (&format!("{plain} --control-fd 3 --control-path c"), "cannot be used with"),
            (&format!("{plain} --workers 3 --queues 2"), "give at most as many"),
            (&format!("{plain} --queues 65"), "1..=64"),
            (&format!("{plain} --queues 0"), "1..=64"),
            (&format!("{plain} --block-size 1024"), "512, 4096"),
            (&format!("{plain} --cache none"), "writeback, writethrough"),
            (&format!("{plain} --serial 123456789012345678901"), "at most 20"),
            (&format!("{plain} --buffer-bytes 5"), "are needed"),
            ("--socket-path s --null 1X", "K, M, G or T"),
            ("--socket-path s --null 99999999T", "K, M, G or T"),
            ("resize", "--control-path <PATH>"),
            ("resize --control-path c 1.5G", "K, M, G or T"),
            ("status", "--control-path <PATH>"),
        ] {
            let error = options(rest).expect_err(rest);
            assert!(error.contains(words), "{rest}: {error}");
        }
    }

    #[test]
    fn orders_need_nothing_of_a_disk() {
        let resize = line("resize --control-path c 10G").unwrap().order;
        assert!(matches!(resize, Some(Order::Resize { bytes: Some(bytes), .. }) if bytes == 10 << 30));
        let resize = line("resize --control-path c").unwrap().order;
        assert!(matches!(resize, Some(Order::Resize { bytes: None, .. })));
        assert!(matches!(line("status --control-path c").unwrap().order, Some(Order::Status { .. })));
    }

    #[test]
    fn the_destination_of_a_migration_waits_with_its_lock() {
        let hold = |rest: &str| options(&format!("--socket-path s --blk-file d {rest}")).unwrap().image.hold;
        assert_eq!(hold(""), Hold::WhileServing);
        assert_eq!(hold("--incoming"), Hold::Incoming);
        assert!(options("--socket-path s --blk-file d --protected --control-fd 3 --incoming").is_err());
    }

    #[test]
    fn a_protected_disk_goes_through_the_page_cache() {
        let protected = options("--socket-path s --blk-file d --protected --control-fd 3").unwrap();
        assert_eq!((protected.image.direct, protected.image.hold), (Direct::Off, Hold::WhileOpen));
    }
}
