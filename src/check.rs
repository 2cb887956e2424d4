//! `colo check`: can this host protect the VM of a configuration?

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::config::{ArbiterConfig, Config};
use crate::pair::{find_program, qemu_config};
use crate::vm::qemu;

/// Every point that fails, each a sentence with its remedy. Nothing is changed on the host.
pub fn faults(config: &Config, node: &str) -> Vec<String> {
    let this = &config.node[node];
    let mut faults: Vec<String> = Vec::new();
    for program in [&config.net.program, &config.disk.program] {
        if !is_executable(&find_program(program)) {
            faults.push(format!(
                "The back end {} is neither beside colo nor in PATH: install it or name it in the configuration",
                program.display()
            ));
        }
    }
    faults.extend(disk_fault(&this.disk, config.disk.block_size));
    faults.extend([&config.vm.kernel, &config.vm.initrd].into_iter().flatten().filter_map(|path| {
        let error = File::open(path).err()?;
        Some(format!("{} cannot be read ({error}): correct vm.kernel and vm.initrd", path.display()))
    }));
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        faults.push(format!("/dev/net/tun cannot be opened ({error}): load the module tun and run as root"));
    }
    if let Err(error) = TcpListener::bind((this.address, 0)) {
        faults.push(format!(
            "node.{node}.address = {} cannot be bound ({error}): configure it on this host",
            this.address
        ));
    }
    let ArbiterConfig::File { directory } = &config.arbiter;
    if !directory.is_dir() {
        faults.push(format!(
            "arbiter.directory {} is no directory: create it where both hosts see it",
            directory.display()
        ));
    } else if rustix::fs::access(directory, rustix::fs::Access::WRITE_OK).is_err() {
        faults
            .push(format!("arbiter.directory {} cannot be written: correct its rights", directory.display()));
    }
    if let Err(error) = io_uring::IoUring::<io_uring::squeue::Entry>::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(4)
    {
        faults.push(format!(
            "io_uring cannot be used ({error}): Linux 6.1 or later is needed, and kernel.io_uring_disabled=0"
        ));
    }
    faults.extend(qemu::check::host(&qemu_config(config, node, Path::new(""))));
    faults
}

fn disk_fault(disk: &Path, block_bytes: u32) -> Option<String> {
    let metadata = match fs::metadata(disk) {
        Ok(metadata) => metadata,
        Err(error) => {
            return Some(format!(
                "The disk {} is not there ({error}): copy the image to this host",
                disk.display()
            ));
        }
    };
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Some(format!("The disk {} is neither a file nor a block device", disk.display()));
    }
    if kind.is_file() && (metadata.len() == 0 || !metadata.len().is_multiple_of(block_bytes.into())) {
        return Some(format!(
            "The disk {} has {} bytes, which is no multiple of {block_bytes}: give a raw image",
            disk.display(),
            metadata.len()
        ));
    }
    let error = File::options().read(true).write(true).open(disk).err()?;
    Some(format!("The disk {} cannot be opened for writing ({error}): correct its rights", disk.display()))
}

fn is_executable(program: &Path) -> bool {
    let runs = |path: &Path| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    if program.components().count() > 1 {
        return runs(program);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| runs(&directory.join(program)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_is_not_of_whole_blocks_is_a_fault() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096 + 512).unwrap();
        assert_eq!(disk_fault(file.path(), 512), None);
        assert!(disk_fault(file.path(), 4096).unwrap().contains("no multiple of 4096"));
        assert!(disk_fault(Path::new("/dev/null"), 512).unwrap().contains("neither"));
    }
}
