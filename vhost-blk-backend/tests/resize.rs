//! A disk that gets another length while it is served.

mod guest;
mod side;

use colo::control::{Command, Role};
use colo::memory::DirtyLogs;
use colo::vhost_user::Device;
use guest::*;
use side::Side;
use vhost_blk_backend::backend::{Backend, Options};
use vhost_blk_backend::image::{Direct, ImageOptions, Source};

const DISK_BYTES: u64 = 1 << 20;

#[test]
fn a_guest_can_use_what_was_added() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(DISK_BYTES).unwrap();
    let image = ImageOptions { direct: Direct::Off, ..ImageOptions::new(Source::File(file.path().into())) };
    let backend = Backend::start(&Options::new(image)).unwrap();
    backend.serve_alone();
    let mut guest = Guest::start(backend.clone(), DirtyLogs::new());
    let beyond = DISK_BYTES / 512;
    guest.begin_write(beyond, &[5; 512]);
    assert_eq!(guest.await_ended().status, IO_ERROR);
    assert_eq!(backend.resize(Some(2 * DISK_BYTES)).unwrap(), 2 * DISK_BYTES);
    assert_eq!(backend.config_bytes()[..8], (2 * DISK_BYTES / 512).to_le_bytes());
    guest.write(beyond, &[5; 512]);
    assert_eq!(guest.read(beyond, 512), [5; 512]);
    let refused = backend.resize(Some(DISK_BYTES)).unwrap_err();
    assert!(refused.contains("only enlarged"), "{refused}");
    assert_eq!(guest.read(beyond, 512), [5; 512]);
}

#[test]
fn a_protected_disk_keeps_its_length() {
    let mut side = Side::start(&vec![0; DISK_BYTES as usize], 1 << 20);
    let resize = Command::Resize { bytes: Some(2 * DISK_BYTES) };
    let refused = side.tell(&resize).unwrap_err();
    assert!(refused.contains("waiting") && refused.contains("resize both images"), "{refused}");
    let (_peer, link) = side::link();
    side.attach(Role::Primary, &link).unwrap();
    let refused = side.tell(&resize).unwrap_err();
    assert!(refused.contains("primary"), "{refused}");
    side.tell(&Command::TakeOver).unwrap();
    assert_eq!(side.tell(&resize).unwrap()["disk_bytes"], 2 * DISK_BYTES);
    side.change_controllers();
    assert_eq!(side.greeted_disk_bytes(), Some(2 * DISK_BYTES));
}
