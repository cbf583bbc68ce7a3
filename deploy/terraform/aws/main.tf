# The same figures on AWS: leases become scheduled scaling of a group of GPU machines.
terraform {
  required_version = ">= 1.9"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { project = var.name }
  }
}

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
  gpus_per_host    = var.gpus_per_instance
  machine          = { cores = data.aws_ec2_instance_type.node.default_vcpus, memory_gb = floor(data.aws_ec2_instance_type.node.memory_size / 1024) }
}

data "aws_ec2_instance_type" "node" {
  instance_type = var.instance_type
}

data "aws_caller_identity" "me" {}

resource "aws_vpc" "private" {
  cidr_block           = var.private_cidr
  enable_dns_hostnames = true
}

resource "aws_default_security_group" "closed" {
  vpc_id = aws_vpc.private.id
}

# what has no public address goes out through the NAT gateway; nothing comes in that way
resource "aws_subnet" "private" {
  vpc_id     = aws_vpc.private.id
  cidr_block = cidrsubnet(var.private_cidr, 1, 0)
}

resource "aws_subnet" "public" {
  vpc_id            = aws_vpc.private.id
  cidr_block        = cidrsubnet(var.private_cidr, 3, 7)
  availability_zone = aws_subnet.private.availability_zone
}

resource "aws_internet_gateway" "out" {
  vpc_id = aws_vpc.private.id
}

resource "aws_eip" "nat" {
  domain = "vpc"
}

resource "aws_nat_gateway" "out" {
  subnet_id     = aws_subnet.public.id
  allocation_id = aws_eip.nat.id
  depends_on    = [aws_internet_gateway.out]
}

resource "aws_route_table" "public" {
  vpc_id = aws_vpc.private.id
  route {
    cidr_block = "0.0.0.0/0"
    gateway_id = aws_internet_gateway.out.id
  }
}

resource "aws_route_table" "private" {
  vpc_id = aws_vpc.private.id
  route {
    cidr_block     = "0.0.0.0/0"
    nat_gateway_id = aws_nat_gateway.out.id
  }
}

resource "aws_route_table_association" "public" {
  subnet_id      = aws_subnet.public.id
  route_table_id = aws_route_table.public.id
}

resource "aws_route_table_association" "private" {
  subnet_id      = aws_subnet.private.id
  route_table_id = aws_route_table.private.id
}

resource "aws_security_group" "nodes" {
  name        = "${var.name}-nodes"
  description = "Machines among each other, and what module.plan lets in"
  vpc_id      = aws_vpc.private.id
}

resource "aws_vpc_security_group_ingress_rule" "inside" {
  security_group_id            = aws_security_group.nodes.id
  referenced_security_group_id = aws_security_group.nodes.id
  ip_protocol                  = "-1"
  description                  = "The machines among each other"
}

resource "aws_vpc_security_group_ingress_rule" "outside" {
  for_each          = module.plan.ingress
  security_group_id = aws_security_group.nodes.id
  cidr_ipv4         = each.value.cidr
  from_port         = each.value.port
  to_port           = each.value.port
  ip_protocol       = "tcp"
  description       = each.key
}

resource "aws_vpc_security_group_egress_rule" "out" {
  security_group_id = aws_security_group.nodes.id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "-1"
  description       = "Packages and images"
}

resource "aws_key_pair" "operator" {
  key_name   = "${var.name}-operator"
  public_key = var.public_key
}

resource "aws_iam_role" "node" {
  name = "${var.name}-node"
  assume_role_policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Action = "sts:AssumeRole", Principal = { Service = "ec2.amazonaws.com" } }]
  })
}

resource "aws_iam_role_policy" "bucket" {
  name = "bucket"
  role = aws_iam_role.node.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Effect = "Allow", Action = ["s3:ListBucket"], Resource = aws_s3_bucket.artifacts.arn },
      { Effect = "Allow", Action = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"], Resource = "${aws_s3_bucket.artifacts.arn}/*" },
      # what lies there is sealed with this key
      { Effect = "Allow", Action = ["kms:Decrypt", "kms:GenerateDataKey"], Resource = aws_kms_key.data.arn },
    ]
  })
}

resource "aws_iam_instance_profile" "node" {
  name = "${var.name}-node"
  role = aws_iam_role.node.name
}

resource "aws_instance" "node" {
  for_each               = module.plan.nodes
  ami                    = var.image_id
  instance_type          = var.instance_type
  subnet_id              = contains(values(module.plan.floating_ips), each.key) ? aws_subnet.public.id : aws_subnet.private.id
  vpc_security_group_ids = [aws_security_group.nodes.id]
  key_name               = aws_key_pair.operator.key_name
  iam_instance_profile   = aws_iam_instance_profile.node.name
  ebs_optimized          = true
  monitoring             = true
  tags                   = { Name = each.key, role = each.value }
  metadata_options {
    http_tokens   = "required"
    http_endpoint = "enabled"
  }
  root_block_device {
    encrypted   = true
    volume_size = 40
  }
}

# The language service of staging and production needs a GPU at any hour.
resource "aws_instance" "serving" {
  for_each               = toset(module.plan.serving)
  ami                    = var.gpu_image_id
  instance_type          = var.serving_instance_type
  subnet_id              = aws_subnet.private.id
  vpc_security_group_ids = [aws_security_group.nodes.id]
  key_name               = aws_key_pair.operator.key_name
  iam_instance_profile   = aws_iam_instance_profile.node.name
  ebs_optimized          = true
  monitoring             = true
  tags                   = { Name = each.key, role = "gpu" }
  metadata_options {
    http_tokens   = "required"
    http_endpoint = "enabled"
  }
  root_block_device {
    encrypted   = true
    volume_size = 100
  }
}

resource "aws_launch_template" "gpu" {
  name                   = "${var.name}-gpu"
  image_id               = var.gpu_image_id
  instance_type          = var.gpu_instance_type
  key_name               = aws_key_pair.operator.key_name
  vpc_security_group_ids = [aws_security_group.nodes.id]
  iam_instance_profile {
    name = aws_iam_instance_profile.node.name
  }
  metadata_options {
    http_tokens   = "required"
    http_endpoint = "enabled"
  }
}

resource "aws_autoscaling_group" "gpu" {
  name                = "${var.name}-gpu"
  min_size            = 0
  max_size            = module.plan.gpu_machines
  desired_capacity    = 0
  vpc_zone_identifier = [aws_subnet.private.id]
  launch_template {
    id      = aws_launch_template.gpu.id
    version = aws_launch_template.gpu.latest_version
  }
  tag {
    key                 = "role"
    value               = "gpu"
    propagate_at_launch = true
  }
  # the schedule sets it
  lifecycle {
    ignore_changes = [desired_capacity, min_size, max_size]
  }
}

resource "aws_autoscaling_schedule" "gpu" {
  for_each               = { up = module.plan.gpu_machines, down = 0 }
  scheduled_action_name  = "${var.name}-${each.key}"
  autoscaling_group_name = aws_autoscaling_group.gpu.name
  recurrence             = module.plan.schedule[each.key]
  time_zone              = "Etc/UTC"
  min_size               = each.value
  max_size               = module.plan.gpu_machines
  desired_capacity       = each.value
}

resource "aws_kms_key" "data" {
  description             = "Films and models"
  enable_key_rotation     = true
  deletion_window_in_days = 30
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Effect    = "Allow"
        Action    = "kms:*"
        Resource  = "*"
        Principal = { AWS = "arn:aws:iam::${data.aws_caller_identity.me.account_id}:root" }
      },
      {
        Effect    = "Allow"
        Action    = ["kms:Encrypt", "kms:Decrypt", "kms:GenerateDataKey*", "kms:DescribeKey"]
        Resource  = "*"
        Principal = { Service = "logs.${var.region}.amazonaws.com" }
      },
    ]
  })
}

# who talked to whom, kept for a year
resource "aws_cloudwatch_log_group" "flow" {
  name              = "${var.name}-flow"
  retention_in_days = 365
  kms_key_id        = aws_kms_key.data.arn
}

resource "aws_iam_role" "flow" {
  name = "${var.name}-flow"
  assume_role_policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Action = "sts:AssumeRole", Principal = { Service = "vpc-flow-logs.amazonaws.com" } }]
  })
}

resource "aws_iam_role_policy" "flow" {
  name = "flow"
  role = aws_iam_role.flow.id
  policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Action = ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"], Resource = "${aws_cloudwatch_log_group.flow.arn}:*" }]
  })
}

resource "aws_flow_log" "private" {
  vpc_id          = aws_vpc.private.id
  traffic_type    = "ALL"
  log_destination = aws_cloudwatch_log_group.flow.arn
  iam_role_arn    = aws_iam_role.flow.arn
}

resource "aws_ebs_volume" "data" {
  availability_zone = aws_subnet.private.availability_zone
  size              = module.plan.storage_gb
  encrypted         = true
  kms_key_id        = aws_kms_key.data.arn
  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_volume_attachment" "data" {
  device_name = "/dev/sdf"
  volume_id   = aws_ebs_volume.data.id
  instance_id = aws_instance.node[one([for name, role in module.plan.nodes : name if role == (var.nodes > 1 ? "data" : "control")])].id
}

resource "aws_s3_bucket" "artifacts" {
  bucket = "${var.name}-${module.plan.bucket}-${data.aws_caller_identity.me.account_id}"
}

resource "aws_s3_bucket_public_access_block" "artifacts" {
  bucket                  = aws_s3_bucket.artifacts.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_versioning" "artifacts" {
  bucket = aws_s3_bucket.artifacts.id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "artifacts" {
  bucket = aws_s3_bucket.artifacts.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = aws_kms_key.data.arn
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "artifacts" {
  bucket = aws_s3_bucket.artifacts.id
  rule {
    id     = "old"
    status = "Enabled"
    filter {}
    noncurrent_version_expiration {
      noncurrent_days = 90
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }
}

resource "aws_eip" "public" {
  for_each = module.plan.floating_ips
  domain   = "vpc"
  instance = aws_instance.node[each.value].id
}
