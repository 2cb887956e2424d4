//! Stock QEMU as a VM: launch, QMP, the dirty-page tracker, device state.
