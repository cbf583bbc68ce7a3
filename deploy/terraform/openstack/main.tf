# Chameleon, or any OpenStack. Credentials come from clouds.yaml (OS_CLOUD), never from a variable.
terraform {
  required_version = ">= 1.9"
  required_providers {
    openstack = {
      source  = "terraform-provider-openstack/openstack"
      version = "~> 3.0"
    }
  }
}

provider "openstack" {}

module "plan" {
  source           = "../plan"
  name             = var.name
  nodes            = var.nodes
  storage_gb       = var.storage_gb
  occasional_ip    = var.occasional_ip
  gpus             = var.gpus
  first_monday     = var.first_monday
  weeks            = var.weeks
  admin_cidr       = var.admin_cidr
  clinic_cidr      = var.clinic_cidr
  block_days       = var.block_days
  block_start_hour = var.block_start_hour
  block_hours      = var.block_hours
  environment      = var.environment
  serving_gpus     = var.serving_gpus
  gpus_per_host    = var.gpus_per_host
  machine          = { cores = data.openstack_compute_flavor_v2.node.vcpus, memory_gb = floor(data.openstack_compute_flavor_v2.node.ram / 1024) }
}

data "openstack_compute_flavor_v2" "node" {
  name = var.flavor
}

resource "openstack_networking_network_v2" "private" {
  name           = var.name
  admin_state_up = true
}

resource "openstack_networking_subnet_v2" "private" {
  name            = var.name
  network_id      = openstack_networking_network_v2.private.id
  cidr            = var.private_cidr
  ip_version      = 4
  dns_nameservers = var.dns
}

data "openstack_networking_network_v2" "public" {
  name = var.public_network
}

resource "openstack_networking_router_v2" "out" {
  name                = var.name
  external_network_id = data.openstack_networking_network_v2.public.id
}

resource "openstack_networking_router_interface_v2" "out" {
  router_id = openstack_networking_router_v2.out.id
  subnet_id = openstack_networking_subnet_v2.private.id
}

resource "openstack_networking_secgroup_v2" "nodes" {
  name        = "${var.name}-nodes"
  description = "Machines among each other, and what module.plan lets in"
}

resource "openstack_networking_secgroup_rule_v2" "inside" {
  direction         = "ingress"
  ethertype         = "IPv4"
  remote_group_id   = openstack_networking_secgroup_v2.nodes.id
  security_group_id = openstack_networking_secgroup_v2.nodes.id
}

resource "openstack_networking_secgroup_rule_v2" "outside" {
  for_each          = module.plan.ingress
  direction         = "ingress"
  ethertype         = "IPv4"
  protocol          = "tcp"
  port_range_min    = each.value.port
  port_range_max    = each.value.port
  remote_ip_prefix  = each.value.cidr
  security_group_id = openstack_networking_secgroup_v2.nodes.id
}

resource "openstack_compute_keypair_v2" "operator" {
  name       = "${var.name}-operator"
  public_key = var.public_key
}

resource "openstack_networking_port_v2" "node" {
  for_each           = module.plan.nodes
  name               = each.key
  network_id         = openstack_networking_network_v2.private.id
  security_group_ids = [openstack_networking_secgroup_v2.nodes.id]
  fixed_ip {
    subnet_id = openstack_networking_subnet_v2.private.id
  }
}

resource "openstack_compute_instance_v2" "node" {
  for_each    = module.plan.nodes
  name        = each.key
  image_name  = var.image
  flavor_name = var.flavor
  key_pair    = openstack_compute_keypair_v2.operator.name
  metadata    = { role = each.value }
  network {
    port = openstack_networking_port_v2.node[each.key].id
  }
}

# The language service of staging and production needs a GPU at any hour.
resource "openstack_compute_instance_v2" "serving" {
  for_each        = toset(module.plan.serving)
  name            = each.key
  image_name      = var.gpu_image
  flavor_name     = var.serving_flavor
  key_pair        = openstack_compute_keypair_v2.operator.name
  security_groups = [openstack_networking_secgroup_v2.nodes.name]
  metadata        = { role = "gpu" }
  network {
    uuid = openstack_networking_network_v2.private.id
  }
}

# Bare machines with GPUs exist while a lease does: var.reservations holds the ids of the leases that run.
resource "openstack_compute_instance_v2" "gpu" {
  for_each        = var.reservations
  name            = each.key
  image_name      = var.gpu_image
  flavor_name     = var.gpu_flavor
  key_pair        = openstack_compute_keypair_v2.operator.name
  security_groups = [openstack_networking_secgroup_v2.nodes.name]
  metadata        = { role = "gpu" }
  network {
    uuid = openstack_networking_network_v2.private.id
  }
  scheduler_hints {
    additional_properties = { reservation = each.value }
  }
}

resource "openstack_blockstorage_volume_v3" "data" {
  name = "${var.name}-data"
  size = module.plan.storage_gb
  lifecycle {
    prevent_destroy = true
  }
}

resource "openstack_compute_volume_attach_v2" "data" {
  instance_id = openstack_compute_instance_v2.node[one([for name, role in module.plan.nodes : name if role == (var.nodes > 1 ? "data" : "control")])].id
  volume_id   = openstack_blockstorage_volume_v3.data.id
}

resource "openstack_objectstorage_container_v1" "bucket" {
  name       = module.plan.bucket
  versioning = true
}

resource "openstack_networking_floatingip_v2" "public" {
  for_each = module.plan.floating_ips
  pool     = var.public_network
}

resource "openstack_networking_floatingip_associate_v2" "public" {
  for_each    = module.plan.floating_ips
  floating_ip = openstack_networking_floatingip_v2.public[each.key].address
  port_id     = openstack_networking_port_v2.node[each.value].id
  depends_on  = [openstack_networking_router_interface_v2.out]
}
